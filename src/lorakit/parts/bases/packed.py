"""A weight packed to four bits: its codes, its scales, and what they decode to."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.core.errors import BadParameter
from lorakit.ops import triton
from lorakit.parts.bases import nf4
from lorakit.parts.bases.scales import BLOCK, dequantize_scales, dynamic_map, quantize_scales

TILES = {"cpu": 2**19}
"""Entries that are decoded at a time: what fits a cache; 2²⁴ on a device that has none to speak of."""


@dataclass(frozen=True)
class Layout:
    """What a packed W (d_out × d_in) was and how it is cut: `dtype` is the one that it decodes to."""

    d_out: int
    d_in: int
    dtype: torch.dtype
    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.blocksize not in nf4.BLOCKSIZES:
            raise BadParameter(f"blocksize={self.blocksize} is not one of {', '.join(map(str, nf4.BLOCKSIZES))}")

    @property
    def numel(self) -> int:
        return self.d_out * self.d_in

    @property
    def blocks(self) -> int:
        """Scales."""
        return -(-self.numel // self.blocksize)

    def tiles(self, device: torch.device) -> list[tuple[int, int]]:
        """Ranges of rows of so many entries each, which all begin where a block begins."""
        step = self.blocksize // math.gcd(self.blocksize, self.d_in)
        rows = max(1, TILES.get(device.type, 2**24) // (self.d_in * step)) * step
        return [(a, min(a + rows, self.d_out)) for a in range(0, self.d_out, rows)]


class Packed(NamedTuple):
    """`codes` uint8 [⌈n / 2⌉, 1]; `scales` fp32 [b], or uint8 [b] with `nested` fp32 [⌈b / 256⌉ + 1], whose last entry is the offset."""

    codes: Tensor
    scales: Tensor
    nested: Tensor | None

    @classmethod
    def of(cls, W: Tensor, layout: Layout) -> "Packed":
        """W quantized. Raises BadParameter for NaN and infinity."""
        if W.is_meta:
            return _empty(layout, W.device)
        codes, scales = nf4.quantize(W, blocksize=layout.blocksize)
        if not layout.double_quant:
            return cls(nf4.pack(codes), scales, None)
        small, nested, offset = quantize_scales(scales)
        return cls(nf4.pack(codes), small, torch.cat([nested, offset[None]]))

    def rows(self, layout: Layout, a: int, b: int) -> Tensor:
        """Rows a to b of W, where a begins a block: fp32 rounded to the layout's dtype, [b − a, d_in]."""
        start, n, size = a * layout.d_in, (b - a) * layout.d_in, layout.blocksize
        if triton.available(self.codes.device, layout.dtype):
            return self._launched(layout, start, n).view(b - a, layout.d_in)
        pairs = _pairs(self.codes.device).index_select(0, self.codes.view(-1)[start // 2 : -(-(start + n) // 2)].int())
        first, last = start // size, -(-(start + n) // size)
        scales = self.scales[first:last]
        if self.nested is not None:
            scales = dequantize_scales(scales, self.nested[:-1], self.nested[-1], first=first)
        return nf4.rescaled(pairs.view(torch.float32)[:n], scales, size).to(layout.dtype).view(b - a, layout.d_in)

    def _launched(self, layout: Layout, start: int, n: int) -> Tensor:
        """n entries from `start` in one pass on a GPU: the same bits, and nothing in fp32 on the way."""
        from lorakit.ops.triton.nf4 import decode

        tables = _levels(self.codes.device), dynamic_map(self.codes.device)
        return decode(*self, *tables, start=start, n=n, blocksize=layout.blocksize, dtype=layout.dtype)

    def nbytes(self) -> int:
        """Bytes of all three."""
        return sum(t.nbytes for t in self if t is not None)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(nf4.LEVELS, device=device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels that a byte stands for, side by side as the bits of one int64, [256]: half as many lookups."""
    levels = torch.tensor(nf4.LEVELS)
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).view(torch.int64).view(-1).to(device)


def _empty(layout: Layout, device: torch.device) -> Packed:
    codes = torch.empty(-(-layout.numel // 2), 1, dtype=torch.uint8, device=device)
    if not layout.double_quant:
        return Packed(codes, torch.empty(layout.blocks, device=device), None)
    small = torch.empty(layout.blocks, dtype=torch.uint8, device=device)
    return Packed(codes, small, torch.empty(-(-layout.blocks // BLOCK) + 1, device=device))
