"""Learned composition (arXiv:2402.15414): weights by gradient, the adapters frozen.

    ΔW = Σ_i ŵ_i ΔW_i,    ŵ = softmax(v) or v        v: N free values for the model, for each layer, or for each module

It starts at the uniform mixture, ŵ = 1/N, which is `lora_average`. Trained: N·(1 | layers | modules) values, nothing else. Adam without
weight decay, a step on all examples at once, `lr` falling linearly to 0; of the weights passed through those with the lowest loss are kept.
Defaults: a softmax for each module (which of the two and how fine the paper's are is not known to us); steps and lr are ours. The paper
trains the task's head beside the weights; an adapter here that brings a head of its own is refused, as no mixer puts heads together.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from lorakit.core.adapter import Adapter
from lorakit.train.weights.finder import finder
from lorakit.train.weights.found import Found, Tried, best_of, mixed
from lorakit.train.weights.objective import Objective, gradient, mean_loss
from lorakit.train.weights.weighed import Granularity, together


@finder("learned", paper="arXiv:2402.15414")
def learned_composition(
    model: nn.Module,
    adapters: Sequence[Adapter],
    objective: Objective,
    *,
    by: Granularity = "module",
    normalize: Literal["softmax", "none"] = "softmax",
    steps: Annotated[int, Field(ge=1)] = 100,
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1,
    force: bool = False,
) -> Found:
    """Weights by gradient for the model, each layer or each module, from the uniform mixture on; the adapters stay frozen."""
    softmax, tried = normalize == "softmax", list[Tried]()
    base = mean_loss(objective, model)
    with together(model, adapters, by=by, softmax=softmax, force=force) as here:
        start = 0.0 if softmax else 1 / len(adapters)
        here.set_([[start] * len(adapters)] * len(here.v))
        optimizer = torch.optim.Adam([here.v], lr=lr)
        for step in range(steps):
            rows = here.rows()
            loss = gradient(objective, model, here.v)
            tried.append(Tried(rows, loss, loss))
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step()
        last = mean_loss(objective, model)
        tried.append(Tried(here.rows(), last, last))
        found = best_of(here, tried)
    settings = {"by": by, "normalize": normalize, "steps": steps, "lr": lr}
    return mixed(adapters, found, how="learned", space="delta", base=base, force=force, settings=settings)
