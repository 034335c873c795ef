"""Weights that decrease the loss fastest, to first order: one backward, a small non-negative least squares, a line search.

    d = argmin over d ≥ 0 of  ½ dᵀ K d − bᵀ d        K_ij = ⟨ΔW_i, ΔW_j⟩,  b_i = −∂loss/∂w_i at w = 0
    w = t d,  0 ≤ max w ≤ bound

d points where a step of a given length ‖Σ d ΔW‖ lowers the loss most among mixtures that only add: an adapter whose own direction raises
the loss, or that others serve as well, gets weight 0. K is summed over all sites and needs only products as wide as the ranks. t is found
by golden section; `budget` evaluations in all, the first at w = 0.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.adapters.mix.parts import Sources, each_matrix
from lorakit.adapters.update import inner
from lorakit.core.adapter import Adapter
from lorakit.train.weights.finder import finder
from lorakit.train.weights.found import Found, Tried, best_of, mixed
from lorakit.train.weights.objective import Objective, gradient, mean_loss
from lorakit.train.weights.weighed import together

GOLDEN = (math.sqrt(5) - 1) / 2
SWEEPS = 10_000


@finder("nnls", paper="")
def first_order(
    model: nn.Module,
    adapters: Sequence[Adapter],
    objective: Objective,
    *,
    bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.5,
    budget: Annotated[int, Field(ge=3)] = 12,
    force: bool = False,
) -> Found:
    """Non-negative weights along the steepest descent at the base, their length by a line search of `budget` evaluations."""
    K, tried = overlaps(Sources(adapters, force=force)), list[Tried]()
    with together(model, adapters, force=force) as here:
        base = gradient(objective, model, here.v)
        assert here.v.grad is not None
        d = nnls(K, -here.v.grad[0].double().cpu())
        d = d * (bound / float(d.max())) if float(d.max()) > 0 else d
        tried.append(Tried(((0.0,) * len(adapters),), base, base))

        def at(t: float) -> float:
            here.set_([(t * d).tolist()])
            loss = mean_loss(objective, model)
            tried.append(Tried((tuple((t * d).tolist()),), loss, loss))
            return loss if math.isfinite(loss) else math.inf

        if d.any():
            golden(at, budget - 1)
        found = best_of(here, tried)
    settings = {"bound": bound, "budget": budget}
    return mixed(adapters, found, how="nnls", space="delta", base=base, force=force, settings=settings)


def overlaps(sources: Sources) -> Tensor:
    """⟨ΔW_i, ΔW_j⟩ over all sites: [N, N], fp64."""
    n = len(sources.adapters)
    K = torch.zeros(n, n, dtype=torch.float64)
    for site in sources.sites:
        for _, parts in each_matrix(site, sources.factors(site)):
            there = [(i, f) for i, f in enumerate(parts) if f is not None]
            for (i, one), (j, other) in itertools.combinations_with_replacement(there, 2):
                K[i, j] += inner(one, other)
    return K.triu() + K.triu(1).T


def nnls(K: Tensor, b: Tensor) -> Tensor:
    """argmin over d ≥ 0 of ½ dᵀ K d − bᵀ d, by coordinates: [N]. What K says is zero stays 0."""
    d, size = torch.zeros_like(b), K.diagonal()
    for _ in range(SWEEPS):
        before = d.clone()
        for i in torch.nonzero(size > 1e-12 * size.max()).flatten().tolist():
            d[i] = max(0.0, float(d[i] + (b[i] - K[i] @ d) / size[i]))
        if float((d - before).abs().max()) <= 1e-10 * float(d.abs().max()):
            break
    return d


def golden(f: Callable[[float], float], budget: int) -> None:
    """Evaluate f at `budget` points, two or more, that close in on its minimum in [0, 1]."""
    low, high = 0.0, 1.0
    left, right = 1 - GOLDEN, GOLDEN
    at_left, at_right = f(left), f(right)
    for _ in range(budget - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = f(right)
