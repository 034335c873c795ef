"""The forms in which PEFT can hold an adapter: for every module one low-rank pair, and the fields that say what the pairs mean.

    plain      LORA                 ΔW = s·B·A, whatever the method: its factors; PiSSA is [B, −B₀]·[A; A₀], of rank 2r
    dora       LORA, use_dora       the magnitude beside the pair
    pissa      LORA, init pissa     A and B alone: PEFT subtracts the principal part from the base again when it loads
    adalora    ADALORA              the triplets that were not pruned
    closest    LORA                 the best s·B·A of a given rank, for what has no factors; not exact

All but the last are exact up to the rounding of fp32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.pair import Pair, by_module, change
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Delta
from lorakit.core.errors import NotExportable
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.method import describe
from lorakit.core.scale import Rank
from lorakit.core.site import Site


@dataclass(frozen=True)
class Form:
    """Pairs by module. `rank`: how ranks and scales are best said. `restorable`: whether the pairs alone give the adapter back."""

    pairs: dict[str, Pair]
    rank: Rank | None = None
    peft_type: str = "LORA"
    fields: dict[str, Any] = field(default_factory=dict)
    restorable: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of each site's change of the weight; empty where the form is exact."""
    total: float = 0.0


def form_of(adapter: Adapter, *, native: bool, svd_rank: int | None, model: nn.Module | None) -> Form:
    """PEFT's own form of the method if there is one and it is asked for, else the plain one, else the closest of rank `svd_rank`."""
    if not adapter.sites:
        raise NotExportable(f"{adapter.recipe.name} adapts no site: PEFT has no form for an adapter without one")
    own = NATIVE[adapter.recipe.name](adapter, model) if native and adapter.recipe.name in NATIVE else None
    if own is not None:
        return own
    try:
        return plain(adapter, model)
    except NotExportable as error:
        if svd_rank is None:
            raise NotExportable(f"{error}; svd_rank=R (--svd-rank R) writes the closest plain LoRA of rank R, and its error") from None
        return closest(adapter, svd_rank, model)


def argument(adapter: Adapter, name: str) -> Any:
    """An argument of the adapter's recipe, or the method's default."""
    return adapter.recipe.kwargs.get(name, describe(adapter.recipe.name).parameters[name].default)


# -------------------------------------------------------------------------------------------------------------------- the forms
def plain(adapter: Adapter, model: nn.Module | None) -> Form:
    """Any method's factors. Raises NotExportable when it has none."""
    spec = adapter.method().delta
    factors = adapter.factors()
    pairs = [(site, Pair(site.kind, *factors[site.name][:3])) for site in adapter.sites]
    gated = spec is not None and "gate" in spec.provides
    if gated:
        pairs = _pruned(pairs)
    modules, even = by_module(pairs, model)
    if not isinstance(spec, LowRankSpec):
        return Form(modules)
    return Form(modules, _doubled(spec.rank) if spec.anchor else spec.rank, restorable=even and not gated)


def dora(adapter: Adapter, model: nn.Module | None) -> Form | None:
    """The pair of the direction and the magnitude m."""
    spec, deltas = adapter.method().delta, adapter.deltas()
    if not isinstance(spec, LowRankSpec):
        return None
    pairs = [(site, Pair(site.kind, *_factors(deltas[site.name]), m=adapter.of(site)["m"])) for site in adapter.sites]
    modules, even = by_module(pairs, model)
    return Form(modules, spec.rank, fields={"use_dora": True}, restorable=even)


def pissa(adapter: Adapter, model: nn.Module | None) -> Form | None:
    """A and B; only where PEFT's own start is the same one: the exact SVD of a whole linear weight, and nothing for an embedding."""
    spec = adapter.method().delta
    if argument(adapter, "niter") or not isinstance(spec, LowRankSpec):
        return None
    pairs = {}
    for site in adapter.sites:
        tensors = adapter.of(site)
        if site.rows is not None or (site.kind == "embedding" and tensors["B0"].any()):
            return None
        pairs[site.name] = Pair(site.kind, tensors["A"], tensors["B"], spec.rank.named(site.name)[1])
    return Form(pairs, spec.rank, fields={"init_lora_weights": "pissa"}, restorable=True)


def adalora(adapter: Adapter, model: nn.Module | None) -> Form | None:
    """The triplets whose g is not zero; PEFT knows the type for whole linear weights only."""
    spec = adapter.method().delta
    if not _plain_sites(adapter) or not isinstance(spec, LowRankSpec):
        return None
    kept = {site: adapter.of(site)["g"] != 0 for site in adapter.sites}
    if not any(k.any() for k in kept.values()):  # before the first step every g is zero, and nothing was pruned
        kept = {site: torch.ones_like(k) for site, k in kept.items()}
    pairs = {site.name: _triplets(adapter.of(site), site, k, spec.rank.named(site.name)[1]) for site, k in kept.items()}
    masks = {f"{site.name}.lora_E": k.tolist() for site, k in kept.items()}
    fields = {name: argument(adapter, ours) for name, ours in ADALORA_FIELDS.items()}
    fields["rank_pattern"] = None if all(k.all() for k in kept.values()) else masks
    return Form(pairs, None, "ADALORA", fields, restorable=True)


ADALORA_FIELDS = {
    "init_r": "r", "target_r": "target_r", "lora_alpha": "alpha", "tinit": "tinit", "tfinal": "tfinal", "deltaT": "delta_t",
    "beta1": "beta1", "beta2": "beta2", "orth_reg_weight": "orth",
}  # fmt: skip
"""PEFT's field -> our argument."""

NATIVE: dict[str, Callable[[Adapter, nn.Module | None], Form | None]] = {"dora": dora, "pissa": pissa, "adalora": adalora}
"""By recipe. A form that returns None leaves the adapter to the plain one."""


def closest(adapter: Adapter, rank: int, model: nn.Module | None) -> Form:
    """The truncated SVD of every site's change of the weight, and what it leaves out."""
    pairs, tails, squares = [], {}, {}
    deltas = adapter.deltas()
    for site in adapter.sites:
        U, S, Vh = torch.linalg.svd(change(adapter, site, deltas[site.name], model), full_matrices=False)
        root = S[:rank].sqrt()
        pairs.append((site, Pair(site.kind, root[:, None] * Vh[:rank], U[:, :rank] * root, 1.0)))
        tails[site.name], squares[site.name] = S[rank:].square().sum().item(), S.square().sum().item()
    errors = {name: _ratio(tails[name], squares[name]) for name in tails}
    return Form(by_module(pairs, model)[0], errors=errors, total=_ratio(sum(tails.values()), sum(squares.values())))


# --------------------------------------------------------------------------------------------------------------------- the steps
def _pruned(pairs: list[tuple[Site, Pair]]) -> list[tuple[Site, Pair]]:
    """Without the directions whose gate is zero, and without the sites that have no other."""
    kept = [(site, pair, pair.A.any(dim=1)) for site, pair in pairs]
    if not any(k.any() for *_, k in kept):
        return pairs
    return [(site, Pair(pair.kind, pair.A[k], pair.B[:, k], pair.s)) for site, pair, k in kept if k.any()]


def _triplets(tensors: dict[str, Tensor], site: Site, kept: Tensor, s: float) -> Pair:
    return Pair(site.kind, tensors["A"][kept], tensors["B"][:, kept], s, E=tensors["g"][kept][:, None])


def _factors(delta: Delta) -> tuple[Tensor, Tensor, float]:
    f = delta.factors()
    assert f is not None
    return f.A, f.B, f.s


def _plain_sites(adapter: Adapter) -> bool:
    return all(site.kind == "linear" and site.rows is None for site in adapter.sites)


def _doubled(rank: Rank) -> Rank:
    """Twice the rank at the same scale, for the linear rule."""
    ranks = tuple((key, 2 * r) for key, r in rank.rank_pattern)
    alphas = tuple((key, 2 * alpha) for key, alpha in rank.alpha_pattern)
    return Rank(2 * rank.r, 2 * rank.alpha, rank.rule, ranks, alphas)


def _ratio(tail: float, whole: float) -> float:
    return math.sqrt(tail / whole) if whole > 0 else 0.0
