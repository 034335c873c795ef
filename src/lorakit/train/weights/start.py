"""A new adapter that starts as a mixture of old ones (survey 8.1), where that is better than nothing.

    ΔW₀ = Σ_i w_i ΔW_i, cut to rank r by its singular values or kept whole at rank Σ r_i

w comes from any way of finder.py, on a few examples of the new task. `judge`, other examples, then says whether the mixture helps: where
its loss is not below the base's, the adapter is a fresh one instead. What the mixture leaves of the rank is filled as LoRA starts, A random
and B zero, which changes no output: components where A and B are both zero would never learn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.mix import mix
from lorakit.adapters.plain import plain_lora
from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach, attach_adapter
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter
from lorakit.core.site import Site
from lorakit.train.weights.finder import get_finder
from lorakit.train.weights.found import Found
from lorakit.train.weights.objective import Objective, mean_loss

Find = Callable[[nn.Module, Sequence[Adapter], Objective], Found]
TINY = 1e-7
"""Components below this share of a site's largest are none."""


@dataclass(frozen=True)
class Start:
    """A trainable adapter, the mixture that was looked for, and what other examples say of it."""

    adapter: Adapter
    """A plain LoRA: the mixture, or, where that does not help, a fresh one of the same ranks."""
    found: Found
    loss: float
    """Of the mixture as cut, on the judge's examples."""
    base: float
    """Of the model without adapters, on the same."""

    @property
    def helps(self) -> bool:
        """Whether the mixture is better than nothing."""
        return self.loss < self.base


def init_from_mixture(
    model: nn.Module,
    adapters: Sequence[Adapter],
    objective: Objective,
    *,
    how: str | Find = "lorahub",
    rank: int | None = None,
    judge: Objective | None = None,
    seed: int = 0,
    force: bool = False,
) -> Start:
    """The adapter that training on a new task begins with.

    Args:
        objective: the new task's examples, on which the weights are found.
        how: a way by name (finder.py), or a function, such as partial(lorahub, budget=200).
        rank: of the new adapter; None: Σ r of the old ones, or as much as a matrix has.
        judge: held-out examples of the task; None: those of `objective`, on which most mixtures look good.
        seed: of what is drawn to fill the rank.
    """
    if rank is not None and rank < 1:
        raise BadParameter(f"rank={rank} is not possible; r must be at least 1")
    find: Find = partial(get_finder(how).find, force=force) if isinstance(how, str) else how
    found = find(model, adapters, objective)
    whole = found.adapter
    cut = whole if rank is None else mix([whole], "svd", weights=[1.0], rank=rank, force=force)
    judged = judge or objective
    base, loss = mean_loss(judged, model), loss_of(cut, judged, model, force=force)
    fresh = fresh_like(cut, model, rank, seed)
    facts = {"how": found.adapter.meta["search"]["how"], "loss": loss, "base_loss": base, "helps": loss < base}
    begun = filled(cut, fresh) if loss < base else fresh
    return Start(replace(begun, meta={**begun.meta, "start": facts}), found, loss, base)


def loss_of(adapter: Adapter, objective: Objective, model: nn.Module, *, force: bool = False) -> float:
    """The loss of a model with a finished adapter; the model is as it was afterwards."""
    adapted = attach_adapter(model, adapter, force=force)
    try:
        return mean_loss(objective, model)
    finally:
        adapted.detach()


def fresh_like(adapter: Adapter, model: nn.Module, rank: int | None, seed: int) -> Adapter:
    """LoRA as it starts, with s = 1, at the adapter's sites, of this rank or the adapter's own, or as much as a matrix has."""
    shapes = {site.name: adapter.tensors[f"{site.name}.A"].shape for site in adapter.sites}
    ranks = {site.name: min(rank or shapes[site.name][-2], site.d_in, site.d_out) for site in adapter.sites}
    like = plain_lora(adapter.sites, {site.name: _zeros(site, ranks[site.name]) for site in adapter.sites}, {})
    adapted = attach(model, like.method(), seed=seed)
    try:
        state = adapted.state()
    finally:
        adapted.detach()
    kept = {k: v for k, v in adapter.meta.items() if k not in ("mix", "search", "metrics")}
    return replace(state, meta={**kept, "base": state.meta["base"]})


def _zeros(site: Site, r: int) -> Factors:
    stack = () if site.experts is None else (site.experts,)
    return Factors(torch.zeros(*stack, r, site.d_in), torch.zeros(*stack, site.d_out, r), 1.0)


def filled(adapter: Adapter, fresh: Adapter) -> Adapter:
    """The adapter in a fresh one's shapes, its components first, and nowhere one that could never learn."""
    tensors: dict[str, Any] = dict(fresh.tensors)
    for site in adapter.sites:
        key_A, key_B = f"{site.name}.A", f"{site.name}.B"
        A, B = adapter.tensors[key_A], adapter.tensors[key_B]
        tensors[key_A], tensors[key_B] = _over(A, B, fresh.tensors[key_A], fresh.tensors[key_B])
    return replace(fresh, tensors=tensors, meta={**adapter.meta, **fresh.meta})


def _over(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """(A0, B0) with the living components of B A in place of their first ones."""
    k = A.shape[-2]
    size = A.norm(dim=-1) * B.norm(dim=-2)  # [.., k]
    alive = size > TINY * size.max()
    first = torch.where(alive[..., :, None], A, A0[..., :k, :]), torch.where(alive[..., None, :], B, B0[..., :k])
    return torch.cat([first[0], A0[..., k:, :]], -2), torch.cat([first[1], B0[..., k:]], -1)
