"""What a batch says of its samples beside the model's own arguments: their kinds, which go into the context of the forwards.

    kinds [b, t]      each token's kind, −1 at padding
    samples [b, t]    each token's sample, numbered over the batch: a row, or in a packed window a document

A batch whose rows name no kinds leaves the context as it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.context import Cell
from lorakit.core.layer import Slot


@contextmanager
def told(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The batch as the model takes it; inside, an adapted model's context says what the batch says of the samples."""
    inputs = {key: value for key, value in batch.items() if key != "kinds"}
    kinds, cell = batch.get("kinds"), _cell(model)
    if kinds is None or cell is None:
        yield inputs
        return
    with cell.hold(replace(cell.value, kinds=kinds, samples=samples_of(kinds, batch.get("position_ids")))):
        yield inputs


def samples_of(kinds: Tensor, positions: Tensor | None) -> Tensor:
    """Rows, or where positions are given the documents that begin wherever they start again."""
    if positions is None:
        return torch.arange(len(kinds), device=kinds.device)[:, None].expand_as(kinds)
    return ((positions == 0).flatten().cumsum(0) - 1).view_as(kinds)


def _cell(model: nn.Module) -> Cell | None:
    return next((module.cell for module in model.modules() if isinstance(module, Slot)), None)
