"""What of one adapter's change is kept before several are put together, entry by entry.

trim      the entries that are largest in magnitude, exactly ⌊density · n⌋ of the whole matrix, the first among equals (TIES, 2306.01708)
drop      each with probability `density`, and 1/density times as large (DARE, arXiv:2311.03099)
graded    each with a probability that grows with its rank in its row, from density − ε/2 to density + ε/2, and as many times larger as it
          is unlikely (DELLA, arXiv:2406.11617)

A matrix is made some rows at a time and never whole, so the blocks come in order, more than once where a threshold has to be found first.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.errors import BadParameter
from lorakit.ops.mask import Mask, hashed, mixed

BLOCK = 2**16
"""Entries of a block: those of several adapters at a time, and what is made of them, fit into a cache."""


class Rows(NamedTuple):
    """The matrix scale · left · right, or left itself, in fp32."""

    left: Tensor
    """[rows, r], or [rows, columns]."""
    right: Tensor | None = None
    """[r, columns]."""
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.left), (self.left if self.right is None else self.right).shape[1]

    def blocks(self) -> Iterator[Tensor]:
        """Its rows in order, some at a time."""
        right = None if self.right is None else self.right.float()
        for rows in self.left.float().split(max(1, BLOCK // max(1, self.shape[1]))):
            yield rows * self.scale if right is None else (rows * self.scale) @ right


class Draw(NamedTuple):
    """Which random numbers: a pure function of these and the position, whatever ran before."""

    seed: int
    stream: Tensor
    """Of the site and the adapter (core/random.py, stream)."""

    def mask(self, block: int, p: float) -> Mask:
        """What is dropped of one block with probability p."""
        return Mask(torch.tensor([self.seed, block]), self.stream, p)

    def uniform(self, block: int, shape: torch.Size) -> Tensor:
        """Numbers in [0, 1)."""
        words = hashed(mixed(self.seed, block, int(self.stream)), shape.numel(), torch.device("cpu"))
        return ((words >> 11) & (2**53 - 1)).double().mul_(2.0**-53).view(shape)


Keep = Callable[[Rows, Draw], Iterator[Tensor]]


def everything(rows: Rows, draw: Draw) -> Iterator[Tensor]:
    """All entries."""
    return rows.blocks()


def trim(rows: Rows, draw: Draw, *, density: float) -> Iterator[Tensor]:
    """The largest in magnitude."""
    n, m = rows.shape
    k = int(density * n * m + 1e-9)
    if not n * m:  # of zeros nothing is left in an aligned space
        yield from rows.blocks()
        return
    if not k:
        raise BadParameter(f"density={density} keeps none of the {n * m} entries of a weight; take a larger one")
    threshold, equal, spare = _threshold(rows, k)
    smaller = torch.tensor(threshold - 1, dtype=torch.int32).view(torch.float32).item()  # the number before it
    for block in rows.blocks():
        kept = F.hardshrink(block, smaller) if threshold else block  # 0 where no larger than `smaller`
        if spare:
            same = _bits(block) == threshold
            there = int(same.sum())
            if there > equal:
                kept = kept.masked_fill(same & (same.flatten().cumsum(0).view_as(same) > equal), 0)
            equal = max(0, equal - there)
        yield kept


def drop(rows: Rows, draw: Draw, *, density: float) -> Iterator[Tensor]:
    """Some by chance, scaled so that the expectation stays."""
    for i, block in enumerate(rows.blocks()):
        yield draw.mask(i, 1 - density).drop(block)


def graded(rows: Rows, draw: Draw, *, density: float, epsilon: float) -> Iterator[Tensor]:
    """Some by chance, small ones sooner, scaled so that the expectation stays."""
    epsilon = min(epsilon, 2 * density, 2 * (1 - density))  # probabilities end at 0 and 1
    for i, block in enumerate(rows.blocks()):
        ranks = block.abs().argsort(dim=1, stable=True).argsort(1).double()
        kept = density + epsilon * ((ranks + 0.5) / block.shape[1] - 0.5)
        yield torch.where(draw.uniform(i, block.shape) < kept, block / kept, 0).float()


def _threshold(rows: Rows, k: int) -> tuple[int, int, int]:
    """(bits of the k-th largest magnitude, how many entries of just that size are among the k largest, how many are not): by counting, in
    two passes."""
    high = torch.zeros(2**15, dtype=torch.int64)
    for block in rows.blocks():
        high += torch.bincount((_bits(block) >> 16).flatten(), minlength=2**15)
    top, above = _place(high, k)
    low = torch.zeros(2**16, dtype=torch.int64)
    for block in rows.blocks():
        bits = _bits(block)
        found = (bits[bits >> 16 == top] & 0xFFFF).long()
        low.scatter_add_(0, found, torch.ones_like(found))
    rest, more = _place(low, k - above)
    equal = k - above - more
    return (top << 16) | rest, equal, int(low[rest]) - equal


def _place(counts: Tensor, k: int) -> tuple[int, int]:
    """(the bin that holds the k-th from the top, how many lie in bins above it)."""
    from_top = counts.flip(0).cumsum(0)
    i = int((from_top >= k).nonzero()[0])
    return len(counts) - 1 - i, int(from_top[i] - counts[-1 - i])


def _bits(block: Tensor) -> Tensor:
    """Magnitudes as integers of the same order: int32."""
    return block.abs().view(torch.int32)
