"""VERA: ΔW = diag(b) · B · diag(d) · A, with one frozen pair for all modules.

    base_model.vera_A [r, largest in] · base_model.vera_B [largest out, r]          with save_projection
    base_model.model.<module>.vera_lambda_d [r] · vera_lambda_b [out]

A pair that is not in the file is drawn again from its key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.peft_fields import COMMON, FOLLOWED, TARGETS, number, positive, switch, whole
from lorakit.adapters.peft_type import Form, Found, Part, Table, argument
from lorakit.adapters.peft_types.own import OwnType, check_names, own_form, pooled
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch
from lorakit.core.method import Method
from lorakit.core.site import Site

OWN: dict[str, Any] = {"d_initial": 0.1, "projection_prng_key": 0, "r": 256, "save_projection": True, "vera_dropout": 0.0}
ARGUMENTS = ("d_initial", "projection_prng_key", "r", "save_projection")
"""Fields whose names are also those of our arguments."""


def vera(adapter: Adapter, model: nn.Module | None) -> Form[Part] | None:
    """The vectors, and the pair where the recipe saves it."""
    return own_form(adapter, "VERA", {name: argument(adapter, name) for name in ARGUMENTS}, ("A", "B"))


class Vera(OwnType):
    """The sizes of a pair that is not saved follow from the modules."""

    table = Table(
        name="VERA",
        config={**COMMON, **TARGETS, **OWN, "peft_type": "VERA", "bias": "none", "fan_in_fan_out": False, "init_weights": True},
        followed=FOLLOWED | OWN.keys(),
        keys={"linear": {"d": "vera_lambda_d", "b": "vera_lambda_b"}},
        shared={"A": "vera_A", "B": "vera_B"},
        native={"vera": vera},
        fits={"r": positive, "projection_prng_key": whole, "save_projection": switch, "d_initial": number, "vera_dropout": number},
        bias="vera_only",
        dropout="vera_dropout",
    )

    def module(self, name: str, part: Part, config: Mapping[str, Any], path: Path) -> Part:
        return check_names(name, part, {"d", "b"}, path=path)

    def closest(self, found: Found[Part], sites: Sequence[Site]) -> tuple[str, dict[str, Any], dict[str, Part]]:
        kwargs = {name: found.config[name] for name in ARGUMENTS}
        return "vera", {**kwargs, "d_initial": float(kwargs["d_initial"])}, found.modules

    def tensors(self, found: Found[Part], method: Method, sites: Sequence[Site], model: nn.Module | None) -> dict[str, Tensor]:
        vectors = super().tensors(replace(found, shared={}), method, sites, model)
        if not found.config["save_projection"]:  # PEFT draws the pair then, even if there is one in the file
            sizes = max(s.d_in for s in sites), max(s.d_out for s in sites)
            return vectors | pooled({"drawn": torch.empty(0, *sizes)})
        if set(found.shared) != {"A", "B"}:
            raise AdapterMismatch(f"{found.path} says that vera_A and vera_B are saved, and there are {sorted(found.shared)} beside it")
        return vectors | pooled(found.shared)
