"""ADALORA: ΔW = alpha / (r + 1e-5) · B · diag(E) · A, the triplets that were not pruned.

    base_model.model.<module>.lora_A [r, in] · lora_B [out, r] · lora_E [r, 1]

There is no ".weight". `rank_pattern` holds a mask over the initial r of every module.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.pair import Pair
from lorakit.adapters.peft_fields import by_pattern, number, positive, whole
from lorakit.adapters.peft_type import Form, Found, Part, Table, argument, whole_linear
from lorakit.adapters.peft_types.lora import CONFIG as LORA
from lorakit.adapters.peft_types.lora import READ, harmless, refuse_init
from lorakit.adapters.peft_types.pairs import PairType, check_pair
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.scale import RULES
from lorakit.core.site import Site

OWN: dict[str, Any] = {
    "beta1": 0.85,
    "beta2": 0.85,
    "deltaT": 1,
    "init_r": 12,
    "orth_reg_weight": 0.5,
    "rank_pattern": None,
    "target_r": 8,
    "tfinal": 0,
    "tinit": 0,
    "total_step": None,
}
ARGUMENTS = {
    "init_r": "r", "target_r": "target_r", "lora_alpha": "alpha", "tinit": "tinit", "tfinal": "tfinal", "deltaT": "delta_t",
    "beta1": "beta1", "beta2": "beta2", "orth_reg_weight": "orth",
}  # fmt: skip
"""PEFT's field -> our argument."""


def adalora(adapter: Adapter, model: nn.Module | None) -> Form[Pair] | None:
    """The triplets whose g is not zero; PEFT knows the type for whole linear weights only."""
    spec = adapter.method().delta
    if not whole_linear(adapter) or not isinstance(spec, LowRankSpec):
        return None
    kept = {site: adapter.of(site)["g"] != 0 for site in adapter.sites}
    if not any(k.any() for k in kept.values()):  # before the first step every g is zero, and nothing was pruned
        kept = {site: torch.ones_like(k) for site, k in kept.items()}
    pairs = {site.name: _triplets(adapter.of(site), site, k, spec.rank.named(site.name)[1]) for site, k in kept.items()}
    masks = {f"{site.name}.lora_E": k.tolist() for site, k in kept.items()}
    fields = {name: argument(adapter, ours) for name, ours in ARGUMENTS.items()}
    fields["rank_pattern"] = None if all(k.all() for k in kept.values()) else masks
    return Form(pairs, None, "ADALORA", fields, restorable=True)


def _triplets(tensors: dict[str, Tensor], site: Site, kept: Tensor, s: float) -> Pair:
    return Pair(site.kind, tensors["A"][kept], tensors["B"][:, kept], s, E=tensors["g"][kept][:, None])


def _masks(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is bool for x in value)


class AdaLora(PairType):
    """The schedule that the fields speak of is over; lorakit's recipe keeps it."""

    table = Table(
        name="ADALORA",
        config={**LORA, **OWN, "peft_type": "ADALORA"},
        followed=(READ | OWN.keys()) - {"target_parameters"},
        fits={
            "alpha_pattern": by_pattern(number),
            "rank_pattern": by_pattern(_masks),
            "total_step": lambda v: v is None or whole(v),
            **dict.fromkeys(("init_r", "target_r", "deltaT"), positive),
            **dict.fromkeys(("tinit", "tfinal"), whole),
            **dict.fromkeys(("lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight"), number),
        },
        keys={"linear": {"A": "lora_A", "B": "lora_B", "E": "lora_E"}},
        bias="lora_only",
        dropout="lora_dropout",
        native={"adalora": adalora},
    )

    def refuse(self, config: Mapping[str, Any], path: Path) -> None:
        refuse_init(config, path)

    def said(self, form: Form[Pair], carried: Mapping[str, Any]) -> dict[str, Any]:
        """A finished adapter has no schedule left, but PEFT refuses to load one without a number of steps that fits it."""
        init_r, target_r = form.fields["init_r"], form.fields["target_r"]
        steps = max(carried.get("total_step") or 0, form.fields["tinit"] + form.fields["tfinal"] + 1)
        said = carried.get("target_r", target_r)  # PEFT lets it exceed the initial rank
        target = said if min(said, init_r) == target_r else target_r
        return {"init_lora_weights": harmless(carried), "total_step": steps, "target_r": target}

    def module(self, name: str, part: Part, config: Mapping[str, Any], path: Path) -> Pair:
        """The file holds the triplets that are left; the others come back as zeros."""
        parts = check_pair(name, part, frozenset({"A", "B", "E"}), path)
        r = config["init_r"]
        mask = (config["rank_pattern"] or {}).get(f"{name}.lora_E", [True] * r)
        if len(mask) != r or sum(mask) != len(parts["A"]):
            raise AdapterMismatch(
                f"module {name!r} has {len(parts['A'])} triplets; {path} keeps {sum(mask)} of {len(mask)}, init_r being {r}"
            )
        kept = torch.tensor([i for i, keep in enumerate(mask) if keep], dtype=torch.int64)
        A, B, E = (_back(parts[short], kept, r, dim) for short, dim in (("A", 0), ("B", 1), ("E", 0)))
        return Pair(part.kind, A, B, RULES["guarded"](r, config["lora_alpha"]), E=E)

    def closest(self, found: Found[Pair], sites: Sequence[Site]) -> tuple[str, dict[str, Any], dict[str, Pair]]:
        config = found.config
        r = config["init_r"]
        schedule = {"tinit": config["tinit"], "tfinal": config["tfinal"], "delta_t": config["deltaT"]}
        smoothing = {"beta1": float(config["beta1"]), "beta2": float(config["beta2"]), "orth": float(config["orth_reg_weight"])}
        # PEFT lets the target exceed the initial rank, where it means nothing
        kwargs = {"r": r, "target_r": min(config["target_r"], r), "alpha": float(config["lora_alpha"]), **schedule, **smoothing}
        return "adalora", kwargs, found.modules


def _back(tensor: Tensor, kept: Tensor, r: int, dim: int) -> Tensor:
    """The tensor with r ranks along `dim`, zero where none was kept."""
    shape = [r if d == dim else n for d, n in enumerate(tensor.shape)]
    return tensor.new_zeros(shape).index_copy(dim, kept, tensor)
