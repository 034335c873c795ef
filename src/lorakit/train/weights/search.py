"""LoRAHub (arXiv:2307.13269): one weight an adapter, found by a search without gradients on a few examples.

    min over w ∈ [−bound, bound]^N of   loss(w) + l1 · (1/N) Σ|w_i|            budget evaluations, the first at w = 0: the base

The best of all that were tried is kept, so the score is never worse than the base's. Only forwards are run.
`space`: the paper adds A and B up apart with the same w on both (`factor:both`), which needs equal ranks, gives each adapter w² and makes
cross terms; there w and −w are one mixture. Ours is `delta`: Σ w ΔW of any ranks, where a negative weight subtracts.
The search is CMA-ES (the extra `search`), its step size a third of the bound, a point outside the box reflected at its faces: what paper
and survey name. The authors' code takes nevergrad's NGOpt, which at the paper's budget is COBYLA, whatever the number of adapters (release
1.0.12, 1 to 50): `search=cobyla`, linear models in a region of the same size, from the best point anew where it ends early.
The loss is the mean over all labels; the authors' code divides a sum of batch means by the number of examples, so that what l1 weighs
against changes with the batch size.
Defaults: the paper's budget 40, bound 1.5 and l1 0.05.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import nn

from lorakit.core.adapter import Adapter
from lorakit.core.errors import MissingExtra
from lorakit.parts.loops.ask_tell import CMA, Search, Vector, Vectors
from lorakit.train.weights.finder import finder
from lorakit.train.weights.found import Found, Tried, best_of, mixed
from lorakit.train.weights.objective import Objective, mean_loss
from lorakit.train.weights.weighed import Space, together


def reflected(z: Vectors, bound: float) -> Vectors:
    """z in [−bound, bound], mirrored at both ends as often as it takes."""
    return bound - np.abs((z + bound) % (4 * bound) - 2 * bound)


class Boxed:
    """CMA-ES from 0 in [−bound, bound]^n. A plane is the least that it searches: of one weight the second coordinate is thrown away."""

    def __init__(self, n: int, bound: float, seed: int) -> None:
        d = max(2, n)
        self.n, self.bound = n, bound
        self.free = CMA(d, bound / 3, 4 + int(3 * math.log(d)), seed)

    def ask(self) -> Vectors:
        return reflected(self.free.ask()[:, : self.n], self.bound)

    def tell(self, losses: Vector) -> None:
        self.free.tell(losses)

    @property
    def mean(self) -> Vector:
        return reflected(self.free.mean[: self.n], self.bound)


@finder("lorahub", paper="arXiv:2307.13269")
def lorahub(
    model: nn.Module,
    adapters: Sequence[Adapter],
    objective: Objective,
    *,
    search: Literal["cma", "cobyla"] = "cma",
    space: Space = "delta",
    budget: Annotated[int, Field(ge=1)] = 40,
    bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.5,
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05,
    seed: Annotated[int, Field(ge=0)] = 0,
    force: bool = False,
) -> Found:
    """One weight an adapter by a search without gradients, `budget` evaluations of a few examples."""
    n, tried = len(adapters), list[Tried]()
    run = SEARCHES[search](n, bound, seed)
    with together(model, adapters, space=space, force=force) as here:

        def score(w: Vector) -> float:
            if len(tried) == budget:
                raise _SpentError
            here.set_([w.tolist()])
            loss = mean_loss(objective, model)
            tried.append(Tried((tuple(map(float, w)),), loss, loss + l1 * float(np.abs(w).mean())))
            return tried[-1].score

        with suppress(_SpentError):
            score(np.zeros(n))
            run(score)
        found = best_of(here, tried)
    settings = {"search": search, "space": space, "budget": budget, "bound": bound, "l1": l1, "seed": seed}
    return mixed(adapters, found, how="lorahub", space=space, base=tried[0].loss, force=force, settings=settings)


class _SpentError(Exception):
    """The budget is."""


Score = Callable[[Vector], float]
Run = Callable[[Score], None]
"""Calls a function of [n] until it raises."""


def by_cma(n: int, bound: float, seed: int) -> Run:
    """Raises MissingExtra."""
    search: Search = Boxed(n, bound, seed)

    def run(score: Score) -> None:
        while True:
            asked = search.ask()
            search.tell(np.asarray([score(w) for w in asked]))  # the last generation may be cut short

    return run


def by_cobyla(n: int, bound: float, seed: int) -> Run:
    """Nothing is drawn. Raises MissingExtra."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingExtra("scipy", "search") from None
    given = {"method": "COBYLA", "bounds": [(-bound, bound)] * n, "tol": 1e-4 * bound}

    def run(score: Score) -> None:
        best, least = np.zeros(n), math.inf

        def kept(w: Vector) -> float:
            nonlocal best, least
            inside = np.clip(w, -bound, bound)
            found = score(inside)
            if found < least:
                best, least = inside, found
            return found if math.isfinite(found) else sys.float_info.max

        while True:
            minimize(kept, best, options={"rhobeg": bound / 3, "maxiter": 100 * (n + 2)}, **given)

    return run


SEARCHES: Mapping[str, Callable[[int, float, int], Run]] = {"cma": by_cma, "cobyla": by_cobyla}
