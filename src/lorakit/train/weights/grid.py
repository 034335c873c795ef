"""ControlPE (arXiv:2311.09773): W + α ΔW of an adapter that holds a prompt (distill.py), α from a grid, on a validation objective.

α = 0 is the base, 1 the prompt's whole effect, what lies between or beyond grades it. For two prompts W + α₁ ΔW₁ + α₂ ΔW₂, all pairs. α
multiplies ΔW, once: on both A and B it would come to α².
Defaults: 0, 0.1, …, 1; the paper's grid is not known to us.
"""

import itertools
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field
from torch import nn

from lorakit.core.adapter import Adapter
from lorakit.core.errors import BadParameter
from lorakit.train.weights.finder import finder
from lorakit.train.weights.found import Found, Tried, best_of, mixed
from lorakit.train.weights.objective import Objective, mean_loss
from lorakit.train.weights.weighed import together

LIMIT = 1000
"""Evaluations: more is a search's business."""
TENTHS = tuple(i / 10 for i in range(11))
Alpha = Annotated[float, Field(allow_inf_nan=False)]


def listed(value: object) -> object:
    """A flag's "0, 0.5, 1", or its only number, as a list."""
    return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value


@finder("grid", paper="arXiv:2311.09773")
def control_pe(
    model: nn.Module,
    adapters: Sequence[Adapter],
    objective: Objective,
    *,
    values: Annotated[tuple[Alpha, ...], BeforeValidator(listed), Field(min_length=1)] = TENTHS,
    force: bool = False,
) -> Found:
    """The best of a grid of weights for one adapter or two, and the whole table; of equals the first."""
    n, tried = len(values) ** len(adapters), list[Tried]()
    if n > LIMIT:
        raise BadParameter(f"{len(values)} values for {len(adapters)} adapters are {n} evaluations; give fewer values, or take lorahub")
    with together(model, adapters, force=force) as here:
        for w in itertools.product(values, repeat=len(adapters)):
            here.set_([w])
            loss = mean_loss(objective, model)
            tried.append(Tried((w,), loss, loss))
        found = best_of(here, tried)
    base = next((one.loss for one in tried if not any(one.weights[0])), None)
    return mixed(adapters, found, how="grid", space="delta", base=base, force=force, settings={"values": list(values)})
