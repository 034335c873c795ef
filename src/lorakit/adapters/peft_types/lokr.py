"""LOKR: ΔW = alpha / r · w1 ⊗ w2; either factor may itself be a product of two, of rank r.

    base_model.model.<module>.lokr_w1 [a₁, a₂], or lokr_w1_a [a₁, r] · lokr_w1_b [r, a₂]
    base_model.model.<module>.lokr_w2 [b₁, b₂], or lokr_w2_a [b₁, r] · lokr_w2_b [r, b₂]

A full w2 says that r is at least half of its longer side; r has no other meaning then than to divide alpha.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.peft_fields import COMMON, FOLLOWED, TARGETS, by_pattern, number, positive, switch
from lorakit.adapters.peft_names import is_conv1d
from lorakit.adapters.peft_type import Form, Found, Part, PeftType, Table, argument, whole_linear
from lorakit.adapters.peft_types.own import check_names
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch
from lorakit.core.method import Method
from lorakit.core.scale import Rank
from lorakit.core.site import Kind, Site

OWN: dict[str, Any] = {
    "alpha": 8, "alpha_pattern": {}, "decompose_both": False, "decompose_factor": -1, "module_dropout": 0.0, "r": 8, "rank_dropout": 0.0,
    "rank_dropout_scale": False, "rank_pattern": {}, "use_effective_conv2d": False,
}  # fmt: skip
NAMES = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}


@dataclass(frozen=True)
class Product:
    """One module's w1 and w2, and their scale."""

    w1: Tensor
    w2: Tensor
    s: float
    kind: Kind = "linear"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {"w1": self.w1, "w2": self.w2}


def krona(adapter: Adapter, model: nn.Module | None) -> Form[Product] | None:
    """w1 and w2, where PEFT would cut the weights in the same way; it knows the type for torch's own linear modules only."""
    out, into = argument(adapter, "factor_out"), argument(adapter, "factor_in")
    if out != into or not whole_linear(adapter) or any(is_conv1d(site.name, model) for site in adapter.sites):
        return None
    s = float(argument(adapter, "scaling"))
    modules = {site.name: Product(adapter.of(site)["w1"], adapter.of(site)["w2"], s) for site in adapter.sites}
    return Form(modules, None, "LOKR", {"decompose_factor": out}, restorable=True)


def rank_in(config: Mapping[str, Any]) -> Rank:
    """What a LOKR configuration says of r and alpha."""
    patterns = (tuple((config[name] or {}).items()) for name in ("rank_pattern", "alpha_pattern"))
    return Rank(config["r"], config["alpha"], "linear", *patterns)


class Lokr(PeftType[Product]):
    """Read with both factors multiplied out."""

    table = Table(
        name="LOKR",
        config={**COMMON, **TARGETS, **OWN, "peft_type": "LOKR", "exclude_modules": None, "init_weights": True},
        followed=FOLLOWED | OWN.keys(),
        keys={"linear": NAMES},
        native={"krona": krona},
        fits={
            "r": positive,
            "decompose_factor": lambda v: v == -1 or positive(v),
            "alpha_pattern": by_pattern(number),
            "rank_pattern": by_pattern(positive),
            **dict.fromkeys(("alpha", "module_dropout", "rank_dropout"), number),
            **dict.fromkeys(("decompose_both", "rank_dropout_scale", "use_effective_conv2d"), switch),
        },
        patterns=("alpha_pattern", "rank_pattern"),
    )

    def said(self, form: Form[Product], carried: Mapping[str, Any]) -> dict[str, Any]:
        """The words that the configuration once used, where they mean full factors at these scales."""
        if carried and all(self._means(carried, name, product) for name, product in form.modules.items()):
            return {}
        r = 1 << max((max(product.w2.shape) - 1) // 2 for product in form.modules.values()).bit_length()  # a power of 2: s · r / r is s
        (s,) = {product.s for product in form.modules.values()}
        return {"r": r, "alpha": s * r, "rank_pattern": {}, "alpha_pattern": {}, "decompose_both": False}

    def _means(self, config: Mapping[str, Any], name: str, product: Product) -> bool:
        r, s = rank_in(config).named(name)
        full = r >= max(product.w2.shape) / 2 and not (config["decompose_both"] and r < max(product.w1.shape) / 2)
        return full and s == product.s

    def module(self, name: str, part: Part, config: Mapping[str, Any], path: Path) -> Product:
        halves = [({w}, {f"{w}_a", f"{w}_b"}) for w in ("w1", "w2")]
        check_names(name, part, *(first | second for first in halves[0] for second in halves[1]), path=path)
        return Product(_full(name, "w1", part), _full(name, "w2", part), rank_in(config).named(name)[1])

    def closest(self, found: Found[Product], sites: Sequence[Site]) -> tuple[str, dict[str, Any], dict[str, Product]]:
        """One scale for all modules: where theirs differ, they go into w1."""
        scales = {product.s for product in found.modules.values()}
        s = scales.pop() if len(scales) == 1 else 1.0
        modules = {name: p if p.s == s else Product(p.w1 * p.s, p.w2, s) for name, p in found.modules.items()}
        factor = found.config["decompose_factor"]
        return "krona", {"factor_out": factor, "factor_in": factor, "scaling": s}, modules

    def tensors(self, found: Found[Product], method: Method, sites: Sequence[Site], model: nn.Module | None) -> dict[str, Tensor]:
        return {f"{site.name}.{name}": tensor for site in sites for name, tensor in found.modules[site.name].tensors.items()}


def _full(module: str, name: str, part: Part) -> Tensor:
    if name in part.tensors:
        return part.tensors[name]
    a, b = part.tensors[f"{name}_a"], part.tensors[f"{name}_b"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        shapes = f"{name}_a {tuple(a.shape)}, {name}_b {tuple(b.shape)}"
        raise AdapterMismatch(f"the tensors of module {module!r} do not fit each other: {shapes}")
    return a @ b
