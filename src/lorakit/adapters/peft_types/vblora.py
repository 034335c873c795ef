"""VBLORA: the factors are put together from a bank of vectors.

    base_model.vblora_vector_bank [num_vectors, vector_length]
    base_model.model.<module>.vblora_logits_A [r, in / vector_length, num_vectors] · vblora_logits_B [out / vector_length, r, num_vectors]
    … vblora_logits_A_topk_indices [.., topk] · vblora_logits_A_topk_weights [.., topk − 1], and so for B

The last line is what `save_only_topk_weights` leaves of the logits: the choice. Its last weight is what is left of 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.peft_fields import COMMON, FOLLOWED, TARGETS, number, positive, switch
from lorakit.adapters.peft_type import Form, Found, Part, Table, argument
from lorakit.adapters.peft_types.own import OwnType, check_names, own_form
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch
from lorakit.core.site import Site

OWN: dict[str, Any] = {
    "init_logits_std": 0.1, "init_vector_bank_bound": 0.02, "num_vectors": 256, "r": 4, "save_only_topk_weights": False, "topk": 2,
    "vblora_dropout": 0.0, "vector_length": 256,
}  # fmt: skip
ARGUMENTS = {
    "r": "r", "num_vectors": "num_vectors", "vector_length": "vector_length", "topk": "topk", "init_vector_bank_bound": "bank_bound",
    "init_logits_std": "logits_std", "save_only_topk_weights": "compact",
}  # fmt: skip
"""PEFT's field -> our argument."""
FULL = {"A_logits": "vblora_logits_A", "B_logits": "vblora_logits_B"}
CHOICE = {f"{name}_{what}": f"vblora_logits_{name}_topk_{what}" for name in "AB" for what in ("indices", "weights")}


def vb_lora(adapter: Adapter, model: nn.Module | None) -> Form[Part] | None:
    """The bank, and logits or choices."""
    return own_form(adapter, "VBLORA", {field: argument(adapter, ours) for field, ours in ARGUMENTS.items()}, ("V",))


class VbLora(OwnType):
    """Both ways of saving."""

    table = Table(
        name="VBLORA",
        config={**COMMON, **TARGETS, **OWN, "peft_type": "VBLORA", "bias": "none", "exclude_modules": None, "fan_in_fan_out": False},
        followed=FOLLOWED | OWN.keys(),
        keys={"linear": {**FULL, **CHOICE}},
        shared={"V": "vblora_vector_bank"},
        native={"vb_lora": vb_lora},
        fits={
            "save_only_topk_weights": switch,
            **dict.fromkeys(("r", "num_vectors", "vector_length", "topk"), positive),
            **dict.fromkeys(("init_logits_std", "init_vector_bank_bound", "vblora_dropout"), number),
        },
        bias="vblora_only",
        dropout="vblora_dropout",
        identity=False,
    )

    def module(self, name: str, part: Part, config: Mapping[str, Any], path: Path) -> Part:
        part = check_names(name, part, set(CHOICE if config["save_only_topk_weights"] else FULL), path=path)
        beyond = [key for key, tensor in part.tensors.items() if key.endswith("indices") and (tensor.long() >= config["num_vectors"]).any()]
        if beyond:
            raise AdapterMismatch(f"module {name!r} chooses vectors that the bank of {config['num_vectors']} in {path} does not have")
        return part

    def closest(self, found: Found[Part], sites: Sequence[Site]) -> tuple[str, dict[str, Any], dict[str, Part]]:
        kwargs = {ours: found.config[field] for field, ours in ARGUMENTS.items()}
        return "vb_lora", {**kwargs, **{name: float(kwargs[name]) for name in ("bank_bound", "logits_std")}}, found.modules
