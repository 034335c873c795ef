"""What one training step of a run should need: `train/memory.py` asked of the run's own model, optimizer and longest micro-batch."""

import torch

from lorakit.core.attach import Adapted
from lorakit.data.preference import rows_of
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.train.config import TrainConfig
from lorakit.train.dataset import TrainData
from lorakit.train.evaluate import to
from lorakit.train.memory import MemoryEstimate, estimate


def expected(adapted: Adapted, data: TrainData, config: TrainConfig, device: torch.device) -> MemoryEstimate:
    """The rows in bytes of a step on `per_device_train_batch_size` of the longest items, as one process sees it. Nothing is run."""
    side = data.train
    batch = side.collate([side.items[k] for k in side.longest()[: config.per_device_train_batch_size].tolist()])
    if "desirable" in batch:  # KTO's mismatched answers go through the model without a graph
        batch = rows_of(batch, slice(0, len(batch["desirable"])))
    spec = adapted.methods[adapted.active[0]].optim or AdamW()
    return estimate(adapted.model, to(batch, device), optimizer=spec.rule)
