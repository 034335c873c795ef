"""FOURIERFT: a few entries of the update's spectrum, `fourierft_spectrum` [n], at places that are drawn again from their seed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.peft_fields import COMMON, FOLLOWED, TARGETS, by_pattern, number, positive, switch, whole
from lorakit.adapters.peft_rank import by_name, exactly
from lorakit.adapters.peft_type import Form, Found, Part, Table, argument
from lorakit.adapters.peft_types.own import OwnType, check_names, own_form
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch
from lorakit.core.scale import lookup
from lorakit.core.site import Site

OWN: dict[str, Any] = {
    "bias": "none", "exclude_modules": None, "fan_in_fan_out": False, "init_weights": False, "n_frequency": 1000, "n_frequency_pattern": {},
    "random_loc_seed": 777, "scaling": 150.0,
}  # fmt: skip


def fourierft(adapter: Adapter, model: nn.Module | None) -> Form[Part] | None:
    """The coefficients."""
    fields = {
        "n_frequency": argument(adapter, "n_frequency"),
        "n_frequency_pattern": argument(adapter, "n_frequency_pattern") or {},
        "random_loc_seed": argument(adapter, "entry_seed"),
        "scaling": argument(adapter, "scaling"),
        "init_weights": argument(adapter, "init") == "zero",
    }
    return own_form(adapter, "FOURIERFT", fields)


def number_at(config: Mapping[str, Any], name: str) -> int:
    """PEFT's rule for the number of coefficients of a module: a pattern that follows a dot, in the file's order, or its very name."""
    pattern = config["n_frequency_pattern"] or {}
    key = next((key for key in pattern if re.match(rf".*\.{key}$", name)), name)
    return int(pattern.get(key, config["n_frequency"]))


class FourierFT(OwnType):
    """The numbers of coefficients may differ by pattern; PEFT matches patterns in another way than lorakit."""

    table = Table(
        name="FOURIERFT",
        config={**COMMON, **TARGETS, **OWN, "peft_type": "FOURIERFT"},
        followed=FOLLOWED | OWN.keys(),
        keys={"linear": {"c": "fourierft_spectrum"}},
        native={"fourierft": fourierft},
        fits={
            "n_frequency": positive,
            "n_frequency_pattern": by_pattern(positive),
            "random_loc_seed": whole,
            "scaling": number,
            "init_weights": switch,
        },
        patterns=("n_frequency_pattern",),
        bias="fourier_only",
        identity=False,
    )

    def said(self, form: Form[Part], carried: Mapping[str, Any]) -> dict[str, Any]:
        wanted = {name: len(part.tensors["c"]) for name, part in form.modules.items()}
        for words in (carried, form.fields):
            fields = {name: words[name] for name in ("n_frequency", "n_frequency_pattern") if name in words}
            in_order = {**fields, "n_frequency_pattern": dict(sorted((fields.get("n_frequency_pattern") or {}).items()))}
            if len(fields) == 2 and all(number_at(in_order, name) == n for name, n in wanted.items()):
                return fields
        most, others = by_name(wanted)
        return {"n_frequency": most, "n_frequency_pattern": others}

    def module(self, name: str, part: Part, config: Mapping[str, Any], path: Path) -> Part:
        n, c = number_at(config, name), check_names(name, part, {"c"}, path=path).tensors["c"]
        if c.shape != (n,):
            raise AdapterMismatch(f"module {name!r} has coefficients of shape {tuple(c.shape)}, and {path} gives it n_frequency={n}")
        return part

    def closest(self, found: Found[Part], sites: Sequence[Site]) -> tuple[str, dict[str, Any], dict[str, Part]]:
        config, wanted = found.config, {name: len(part.tensors["c"]) for name, part in found.modules.items()}
        n = config["n_frequency"]
        said = {k: v for k, v in (config["n_frequency_pattern"] or {}).items() if any(lookup([(k, -1)], name, 0) for name in wanted)}
        if not all(lookup(sorted(said.items()), name, n) == wanted[name] for name in wanted):
            n, others = by_name(wanted)
            said = {exactly(name): value for name, value in others.items()}
        kwargs = {"n_frequency": n, "scaling": float(config["scaling"]), "entry_seed": config["random_loc_seed"]}
        start = "zero" if config["init_weights"] else "normal"
        return "fourierft", {**kwargs, "init": start, **({"n_frequency_pattern": said} if said else {})}, found.modules
