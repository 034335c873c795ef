"""Held-out figures of a model: loss, perplexity and bits per byte of text; accuracy and F1 of classes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.attach import Adapted
from lorakit.core.errors import DataError
from lorakit.data.packable import eval_mode
from lorakit.train.dataset import Batch, Side
from lorakit.train.distributed import World
from lorakit.train.kinds import told
from lorakit.train.metrics import accuracy, bits_per_byte, forward_loss, macro_f1, perplexity

ALONE = World(0, 1, torch.device("cpu"), False)


def evaluate(model: nn.Module, side: Side, *, batch_size: int, world: World = ALONE, adapted: Adapted | None = None) -> dict[str, float]:
    """Figures over one side of the data: {loss, perplexity, bits_per_byte}, {loss, accuracy, macro_f1}, or what the side's own judge says.

    `adapted`: the model's handle, for what compares it with its base.
    """
    device = next(model.parameters()).device
    batches = (to(batch, device) for batch in side.batches(batch_size, rank=world.rank, world=world.size))
    with eval_mode(model), torch.no_grad():
        if side.judge is not None:
            return side.judge(model, batches, world, adapted)
        return _texts(model, batches, side.n_bytes, world) if side.n_bytes else _classes(model, batches, world)


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _texts(model: nn.Module, batches: Iterable[Batch], n_bytes: int, world: World) -> dict[str, float]:
    nats = tokens = 0.0
    for batch in batches:
        with told(model, batch) as inputs:
            loss, n = forward_loss(model, inputs)
        nats, tokens = nats + loss.item(), tokens + n
    nats, tokens = world.total(nats, tokens)
    if not tokens:
        raise DataError("the evaluation data has no token to predict")
    return {"loss": nats / tokens, "perplexity": perplexity(nats, int(tokens)), "bits_per_byte": bits_per_byte(nats, n_bytes)}


def _classes(model: nn.Module, batches: Iterable[Batch], world: World) -> dict[str, float]:
    nats, predicted, truth = 0.0, [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    for batch in batches:
        labels: Any = batch["labels"]
        with told(model, batch) as inputs:
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.float()
        nats += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        predicted.append(logits.argmax(-1).cpu())
        truth.append(labels.cpu())
    p, y = torch.cat(predicted), torch.cat(truth)
    if world.size > 1:
        parts: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(parts, (p, y))
        p, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    (nats,) = world.total(nats)
    return {"loss": nats / len(y), "accuracy": accuracy(p, y), "macro_f1": macro_f1(p, y)}
