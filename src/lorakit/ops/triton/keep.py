"""The dropout mask in registers: the bits of `ops.mask.keep_mask`, with nothing written to memory.

    byte i = byte i mod 8 of mix(key + (i // 8 + 1) · MIX)         keep_i = byte i ≥ limit of i's row         (mod 2⁶⁴)
    limit  = whole + [ byte 0 of mix((key ^ ROWS) + (row + 1) · MIX) < part ]

Of p · 256 `whole` is the whole part and `part` the rest in 1/256.
"""

import triton
import triton.language as tl

from lorakit.ops.mask import Mask, mixed, steps

_MIX = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_ROWS = tl.constexpr(0x5851F42D4C957F2D)


def numbers(mask: Mask | None) -> tuple[int, int, int]:
    """What a kernel needs of a mask: (key, whole, part)."""
    if mask is None:
        return 0, 0, 0
    seed, step = mask.key.tolist()
    return mixed(seed, step, int(mask.site)), *divmod(steps(mask.p), 256)


@triton.jit
def _mix(z):  # type: ignore[no-untyped-def]
    """splitmix64's output function of uint64."""
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def limits(rows, key, whole, part):  # type: ignore[no-untyped-def]
    """The thresholds of rows [N]: int32 [N]."""
    word = _mix((key.to(tl.uint64) ^ _ROWS) + (rows.to(tl.uint64) + 1) * _MIX)
    return whole + ((word & 255).to(tl.int32) < part).to(tl.int32)


@triton.jit
def keep(rows, first, limit, key, width, BLOCK: tl.constexpr, WHOLE_WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which entries stay: int1 [N, BLOCK] for rows [N], their limits [N], and the columns from `first`, a multiple of 8, of `width`.
    WHOLE_WORDS: width is a multiple of 8, so that eight neighbors share one word and it is mixed once."""
    at = rows.to(tl.uint64)[:, None]
    key = key.to(tl.uint64)
    if WHOLE_WORDS:
        words = at * (width // 8) + (first // 8 + tl.arange(0, BLOCK // 8)).to(tl.uint64)[None, :]
        mixed = _mix(key + (words + 1) * _MIX)
        shifts = (8 * tl.arange(0, 8)).to(tl.uint64)
        bytes = ((mixed[:, :, None] >> shifts[None, None, :]) & 255).to(tl.int32)
        draws = tl.reshape(bytes, (rows.shape[0], BLOCK))
    else:
        i = at * width + (first + tl.arange(0, BLOCK)).to(tl.uint64)[None, :]
        mixed = _mix(key + (i // 8 + 1) * _MIX)
        draws = ((mixed >> (8 * (i % 8))) & 255).to(tl.int32)
    return draws >= limit[:, None]
