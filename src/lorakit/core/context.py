"""What a forward pass may know besides x: an immutable value of tensors (a changing int would recompile a compiled model).

`with adapted.given(step=...)` sets it for the forwards inside; outside, training forwards draw a fresh step from torch's global generator.
Activation checkpointing recomputes under the forward's own value: two forwards before one backward would otherwise get the wrong masks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ctx:
    """`key`: int64 [seed, step] on the CPU, from which every mask inside forward follows."""

    key: Tensor
    ends: Tensor | None = None
    """At an experts site, whose rows are sorted by expert: int32 [E], where each expert's rows end."""
    kinds: Tensor | None = None
    """Each token's kind of sample, int64 [b, t], −1 at padding; None where the data name none."""
    samples: Tensor | None = None
    """Each token's sample, int64 [b, t], numbered over the batch: a row, or in packed windows a document."""
    memo: dict[str, Any] = field(default_factory=dict, compare=False)
    """Inputs of the modules that some delta elsewhere `reads`, by path, and what patches decided; one a forward, filled as it goes."""


@dataclass
class Cell:
    """The one place that holds the current Ctx; every adapted layer of a model shares it."""

    value: Ctx = field(default_factory=lambda: Ctx(torch.zeros(2, dtype=torch.int64)))
    given: bool = False
    draws: bool = False
    """Whether an active delta draws masks."""
    reads: frozenset[str] = frozenset()
    """Paths of the modules whose input is kept in the memo."""

    def hold(self, value: Ctx) -> "Held":
        """Set `value` for the duration of a block."""
        return Held(self, value)

    def checkpoint_contexts(self) -> tuple[object, object]:
        """The pair that torch.utils.checkpoint's `context_fn` wants: nothing in forward, the forward's own Ctx in recomputation."""
        return _Nothing(), self.hold(self.value)


class Held:
    """A block under one Ctx. It can be entered again: a second backward through one graph recomputes a second time."""

    def __init__(self, cell: Cell, value: Ctx) -> None:
        self.cell, self.value = cell, value
        self.before: list[tuple[Ctx, bool]] = []

    def __enter__(self) -> None:
        self.before.append((self.cell.value, self.cell.given))
        self.cell.value, self.cell.given = self.value, True

    def __exit__(self, *exc: object) -> None:
        self.cell.value, self.cell.given = self.before.pop()


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None
