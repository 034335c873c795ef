"""Where a few entries of a long row are, near the entropy: Golomb's code of the gaps between them, without a loop over bits.

    gap = q m + rest        q as that many zeros and a one; rest in ⌈log₂ m⌉ − 1 or ⌈log₂ m⌉ bits (truncated binary)

With every place drawn with probability p this is the best prefix code of the gaps for the m with
(1−p)^m + (1−p)^(m+1) <= 1 < (1−p)^(m−1) + (1−p)^m (Golomb 1966; Gallager and van Voorhis 1975).

Commonly the two parts of each gap follow each other, and a reader learns from one number where the next begins. Here all q come first, then
the leading bits of every rest, then the last bit of those that have one more: as many bits, and a few vector operations. The gap behind
the last place is coded, too, so that the length of the row is checked, and no bits can stand for a row more than 256 times as long.
"""

import math

import numpy as np
from numpy.typing import NDArray

LARGEST = 256
"""The largest m: what a run of places without an entry costs at least, in places a bit."""

Bits = NDArray[np.uint8]
"""One of 0 and 1 each."""


def parameter(p: float) -> int:
    """The best m for places that are drawn with probability p."""
    if p <= 0:
        return LARGEST
    best = 1 if p >= 1 else math.ceil(-math.log(2 - p) / math.log1p(-p))
    return min(max(best, 1), LARGEST)


def encode(places: NDArray[np.int64], length: int, m: int) -> Bits:
    """The bits of `places`, increasing and below `length`."""
    gaps = np.diff(places, prepend=-1, append=length) - 1
    q, rest = np.divmod(gaps, m)
    ends = np.cumsum(q + 1)
    unary = np.zeros(ends[-1], np.uint8)
    unary[ends - 1] = 1
    if m == 1:
        return unary
    width, short = _widths(m)
    long = rest >= short
    numbers = rest + short * long
    heads = (numbers >> long)[:, None] >> np.arange(width - 2, -1, -1) & 1  # [gaps, width − 1]
    return np.concatenate([unary, heads.astype(np.uint8).ravel(), (numbers & 1)[long].astype(np.uint8)])


def decode(bits: Bits, count: int, length: int, m: int) -> tuple[NDArray[np.int64], int]:
    """`count` places in a row of `length`, and how many of the bits they took. Raises ValueError when the bits are none of such a row."""
    ends = np.flatnonzero(bits)[: count + 1]
    if len(ends) <= count:
        raise ValueError(f"{len(ends)} gaps are there where {count + 1} were announced")
    gaps = m * (np.diff(ends, prepend=-1) - 1)
    used = int(ends[-1]) + 1
    if m > 1:
        width, short = _widths(m)
        heads, used = _numbers(bits, used, count + 1, width - 1)
        long = heads >= short
        tails, used = _numbers(bits, used, int(long.sum()), 1)
        gaps += heads
        gaps[long] += heads[long].astype(np.int64) + tails - short
    places = np.cumsum(gaps + 1) - 1
    if places[-1] != length:
        raise ValueError(f"the gaps make a row of {places[-1]} where {length} was announced")
    return places[:-1], used


def _widths(m: int) -> tuple[int, int]:
    """⌈log₂ m⌉ bits, and how many of the smallest rests need one bit less."""
    width = (m - 1).bit_length()
    return width, 2**width - m


def _numbers(bits: Bits, start: int, count: int, width: int) -> tuple[Bits, int]:
    """`count` numbers of `width` < 8 bits each, and where they end."""
    end = start + count * width
    if end > len(bits):
        raise ValueError(f"it ends after {len(bits)} of {end} bits")
    numbers = np.zeros(count, np.uint8)
    for column in bits[start:end].reshape(count, width).T:
        numbers = 2 * numbers + column
    return numbers, end
