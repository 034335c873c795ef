"""Tasks in sequence: several sources of training data, one after another, and what is forgotten on the way.

At the border after a task every task seen so far is evaluated, the optimizer starts afresh and the learning rate runs its schedule anew.

    forgetting = mean over all tasks but the last learned of (held-out loss now − held-out loss when the task had been learned)
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from lorakit.core.errors import BadParameter
from lorakit.train.config import TrainConfig
from lorakit.train.schedule import rate_of

Figures = dict[str, float]


def ends_of(config: TrainConfig, items: Sequence[int], batch: int) -> list[int]:
    """The optimizer step at which each task ends: equal parts of `max_steps`, or `num_train_epochs` passes over the items of each."""
    if config.max_steps > 0:
        if config.max_steps < len(items):
            raise BadParameter(f"max_steps={config.max_steps} cannot be divided among {len(items)} tasks; give at least one step to each")
        return [round((i + 1) * config.max_steps / len(items)) for i in range(len(items))]
    steps = [math.ceil(config.num_train_epochs * n / batch) for n in items]
    return [sum(steps[: i + 1]) for i in range(len(steps))]


def rates_of(config: TrainConfig, ends: Sequence[int]) -> Callable[[int], float]:
    """step -> factor of the peak rate: each task runs the whole schedule, its warmup included."""
    starts = [0, *ends[:-1]]
    factors = [rate_of(config, end - start) for start, end in zip(starts, ends, strict=True)]

    def rate(step: int) -> float:
        task = min(bisect_right(ends, step), len(ends) - 1)
        return factors[task](step - starts[task])

    return rate


def means(rows: Sequence[Figures]) -> Figures:
    """Each figure's mean over the tasks."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def forgetting(borders: Sequence[Sequence[Figures]]) -> float:
    """Mean rise of the loss since each earlier task was learned. `borders[t][i]`: task i's figures after task t, i <= t."""
    now = borders[-1]
    earlier = range(len(now) - 1)
    return sum(now[i]["loss"] - borders[i][i]["loss"] for i in earlier) / max(1, len(earlier))


def summary(borders: Sequence[Sequence[Figures]]) -> Figures:
    """What one line says of a sequence: the figures' means over the tasks seen, and what was forgotten."""
    return means(borders[-1]) | ({"forgetting": forgetting(borders)} if len(borders[-1]) > 1 else {})
