"""The learning rate over a run, as a factor of the peak rate: Transformers' own schedules, asked by step."""

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from lorakit.train.config import TrainConfig


def rate_of(config: TrainConfig, total: int) -> Callable[[int], float]:
    """step -> factor, for a run of `total` optimizer steps."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    any_optimizer = torch.optim.SGD([torch.zeros(())], lr=config.learning_rate)
    schedule = get_scheduler(config.lr_scheduler_type, any_optimizer, num_warmup_steps=warmup, num_training_steps=total)
    (factor,) = schedule.lr_lambdas
    return factor  # type: ignore[no-any-return]
