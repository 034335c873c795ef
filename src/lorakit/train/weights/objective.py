"""What weights are judged by: the loss of a model as it is, usually on a few examples.

loss = Σ over all examples of −log p(completion) / Σ labels        one mean over all labels, however the examples are batched
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError
from lorakit.data.packable import eval_mode
from lorakit.data.row import Row
from lorakit.train.config import make_config
from lorakit.train.dataset import Side, prepare
from lorakit.train.evaluate import to
from lorakit.train.kinds import told
from lorakit.train.metrics import forward_loss
from lorakit.train.rows import Rows

Objective = Callable[[nn.Module], Iterable[tuple[Tensor, int]]]
"""(summed loss, labels) of each batch, with its graph where gradients are wanted: one batch's graph at a time lies in memory."""


@dataclass(frozen=True)
class FewShots:
    """The cross-entropy of a model on all items of a side."""

    side: Side
    batch_size: int = 8

    def __call__(self, model: nn.Module) -> Iterator[tuple[Tensor, int]]:
        device = next(model.parameters()).device
        for batch in self.side.batches(self.batch_size):
            with told(model, to(batch, device)) as inputs:
                yield forward_loss(model, inputs)


def few_shots(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int = 512,
    batch_size: int = 8,
    labels: Sequence[Any] = (),
) -> FewShots:
    """Rows of any shape as an objective, padded. `labels`: of a classifier, in the order of its outputs. Raises DataError."""
    examples = Rows(list(rows), list(rows), tuple(labels))
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    sides = prepare(examples, make_config({"max_length": max_length}), tokenizer, packing=False, encoder_decoder=encoder_decoder)
    if sides.train.aim is not None:
        raise DataError("weights are found on texts, answers or classes; these rows are preferences: give prompt and completion")
    return FewShots(sides.train, batch_size)


def mean_loss(objective: Objective, model: nn.Module) -> float:
    """The loss of a label, in eval mode and without any graph."""
    nats, n = 0.0, 0
    with eval_mode(model), torch.no_grad():
        for loss, labels in objective(model):
            nats, n = nats + loss.item(), n + labels
    return nats / _some(n)


def gradient(objective: Objective, model: nn.Module, v: nn.Parameter) -> float:
    """The loss of a label, in eval mode, and its gradient in `v.grad`."""
    nats, n = 0.0, 0
    v.grad = torch.zeros_like(v)
    with eval_mode(model), torch.enable_grad():
        for loss, labels in objective(model):
            loss.backward()
            nats, n = nats + loss.item(), n + labels
    v.grad /= _some(n)
    return nats / n


def _some(n: int) -> int:
    if n < 1:
        raise DataError("the examples have no label to predict")
    return n
