"""LoRAHub (arXiv:2307.13269): one weight an adapter, found by a search without gradients on a few examples.

    min over w ∈ [−bound, bound]^N of   loss(w) + l1 · (1/N) Σ|w_i|            budget evaluations, the first at w = 0: the base

The best of all that were tried is kept, so the score is never worse than the base's. Only forwards are run.
`space`: the paper adds A and B up apart with the same w on both (`factor:both`), which needs equal ranks, gives each adapter w² and makes
cross terms; there w and −w are one mixture. Ours is `delta`: Σ w ΔW of any ranks, where a negative weight subtracts.
The search is CMA-ES (the extra `search`), its step size a third of the bound, a point outside the box reflected at its faces. The paper
names CMA-ES, too; the authors' code takes nevergrad's NGOpt, whose release 1.0.12 fails with today's numpy.
The loss is the mean over all labels; the authors' code divides a sum of batch means by the number of examples, so that what l1 weighs
against changes with the batch size.
Defaults: the paper's budget 40, bound 1.5 and l1 0.05.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import nn

from lorakit.core.adapter import Adapter
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
    space: Space = "delta",
    budget: Annotated[int, Field(ge=1)] = 40,
    bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.5,
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05,
    seed: Annotated[int, Field(ge=0)] = 0,
    force: bool = False,
) -> Found:
    """One weight an adapter by a search without gradients, `budget` evaluations of a few examples."""
    n, tried = len(adapters), list[Tried]()
    search: Search = Boxed(n, bound, seed)
    with together(model, adapters, space=space, force=force) as here:

        def score(w: Vector) -> float:
            here.set_([w.tolist()])
            loss = mean_loss(objective, model)
            tried.append(Tried((tuple(map(float, w)),), loss, loss + l1 * float(np.abs(w).mean())))
            return tried[-1].score

        score(np.zeros(n))
        while len(tried) < budget:
            asked = search.ask()
            scores = [score(w) for w in asked[: budget - len(tried)]]
            if len(scores) == len(asked):  # the last generation may be cut short
                search.tell(np.asarray(scores))
        found = best_of(here, tried)
    settings = {"space": space, "budget": budget, "bound": bound, "l1": l1, "seed": seed}
    return mixed(adapters, found, how="lorahub", space=space, base=tried[0].loss, force=force, settings=settings)
