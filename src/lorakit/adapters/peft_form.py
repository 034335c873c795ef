"""The form in which PEFT holds an adapter: its own type's where it has one for the method (peft_types/), or else a low-rank pair a module.

    plain      LORA     ΔW = s·B·A, whatever the method: its factors; PiSSA is [B, −B₀]·[A; A₀], of rank 2r
    closest    LORA     the best s·B·A of a given rank, for what has no factors; not exact

All but the last are exact up to the rounding of fp32.
"""

import math
from typing import Any

import torch
from torch import nn

from lorakit.adapters.pair import Pair, by_module, change
from lorakit.adapters.peft_type import Form
from lorakit.adapters.peft_types import NATIVE
from lorakit.core.adapter import Adapter
from lorakit.core.errors import NotExportable
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.method import describe, get_method
from lorakit.core.scale import Rank
from lorakit.core.site import Site


def form_of(adapter: Adapter, *, native: bool, svd_rank: int | None, model: nn.Module | None) -> Form[Any]:
    """PEFT's own form of the method if there is one and it is asked for, else the plain one, else the closest of rank `svd_rank`."""
    if not adapter.sites:
        raise NotExportable(f"{adapter.recipe.name} adapts no site: PEFT has no form for an adapter without one")
    own = _own(adapter, model) if native else None
    if own is not None:
        return own
    try:
        return plain(adapter, model)
    except NotExportable as error:
        if not _of_weights(adapter):
            raise
        if svd_rank is None:
            raise NotExportable(f"{error}; svd_rank=R (--svd-rank R) writes the closest plain LoRA of rank R, and its error") from None
        return closest(adapter, svd_rank, model)


def _of_weights(adapter: Adapter) -> bool:
    """Whether a change of weights is what the adapter is: a low-rank pair could come close to it."""
    return adapter.method().beyond is None and any(delta.bound() > 0 for delta in adapter.deltas().values())


def _own(adapter: Adapter, model: nn.Module | None) -> Form[Any] | None:
    """The native form of the method, or of the first of several that has one and the same combine as all of them together."""
    method = adapter.method()
    for name in adapter.recipe.name.split("+"):
        alone = get_method(name, **{k: v for k, v in adapter.recipe.kwargs.items() if k in describe(name).parameters})
        if name in NATIVE and alone.combine == method.combine:
            return NATIVE[name](adapter, model)
    return None


# -------------------------------------------------------------------------------------------------------------------- the forms
def plain(adapter: Adapter, model: nn.Module | None) -> Form[Pair]:
    """Any method's factors. Raises NotExportable when it has none."""
    spec = adapter.method().delta
    factors = adapter.factors(stacks=True)
    pairs = [(site, Pair(site.kind, *factors[site.name][:3])) for site in adapter.sites]
    gated = spec is not None and "gate" in spec.provides
    if gated:
        pairs = _pruned(pairs)
    modules, even = by_module(pairs, model)
    if not isinstance(spec, LowRankSpec):
        return Form(modules)
    rank = _doubled(spec.rank) if spec.anchor else spec.rank
    as_said = all(pair.r == rank.named(site.name)[0] for site, pair in pairs)  # not grown, pruned, or behind legs
    return Form(modules, rank, restorable=even and as_said and not gated)


def closest(adapter: Adapter, rank: int, model: nn.Module | None) -> Form[Pair]:
    """The truncated SVD of every site's change of the weight, and what it leaves out."""
    pairs, tails, squares = [], {}, {}
    deltas = adapter.deltas()
    for site in adapter.sites:
        U, S, Vh = torch.linalg.svd(change(adapter, site, deltas[site.name], model), full_matrices=False)
        root = S[..., :rank].sqrt()
        pairs.append((site, Pair(site.kind, root[..., None] * Vh[..., :rank, :], U[..., :rank] * root[..., None, :], 1.0)))
        tails[site.name], squares[site.name] = S[..., rank:].square().sum().item(), S.square().sum().item()
    errors = {name: _ratio(tails[name], squares[name]) for name in tails}
    return Form(by_module(pairs, model)[0], errors=errors, total=_ratio(sum(tails.values()), sum(squares.values())))


# --------------------------------------------------------------------------------------------------------------------- the steps
def _pruned(pairs: list[tuple[Site, Pair]]) -> list[tuple[Site, Pair]]:
    """Without the directions whose gate is zero, and without the sites that have no other."""
    kept = [(site, pair, pair.A.any(dim=1)) for site, pair in pairs]
    if not any(k.any() for *_, k in kept):
        return pairs
    return [(site, Pair(pair.kind, pair.A[k], pair.B[:, k], pair.s)) for site, pair, k in kept if k.any()]


def _doubled(rank: Rank) -> Rank:
    """Twice the rank at the same scale, for the linear rule."""
    ranks = tuple((key, 2 * r) for key, r in rank.rank_pattern)
    alphas = tuple((key, 2 * alpha) for key, alpha in rank.alpha_pattern)
    return Rank(2 * rank.r, 2 * rank.alpha, rank.rule, ranks, alphas)


def _ratio(tail: float, whole: float) -> float:
    return math.sqrt(tail / whole) if whole > 0 else 0.0
