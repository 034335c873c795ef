"""Double quantization: the scales of blocks, quantized themselves to one byte each.

    o = mean(c)        n_j = max |c − o| over 256 scales        ĉ_i = M[code_i] · n_j + o        (all in fp32)

M is bitsandbytes' signed dynamic map of 256 values (8-bit, arXiv:1511.04561), not an FP8 type, though the paper says FP8 (section 3). It
takes the cost of a parameter from 4 + 32/64 = 4.5 bits to 4 + 8/64 + 32/(64·256) = 4.127. A code is that of the nearest value; bitsandbytes
on the CPU rounds to a grid of 65536 first, so that some 0.2 % of its codes are a neighbor's.
"""

import functools

import torch
from torch import Tensor

from lorakit.parts.bases.nf4 import TINY

BLOCK = 256


def _dynamic_map() -> tuple[float, ...]:
    """Seven decades with 1, 2, 4, … 64 linear steps each, both signs, and 0 and 1: fp32 values, rising."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (decade - 6) * middles).tolist()
        values += (-(10 ** (decade - 6)) * middles).tolist()
    return tuple(torch.tensor(sorted(values)).tolist())


MAP = _dynamic_map()


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """MAP as fp32 [256]."""
    return torch.tensor(MAP, device=device)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [b], nested scales fp32 [⌈b / 256⌉], offset fp32 []) of b scales."""
    offset = scales.cpu().mean().to(scales.device)  # in one order of summation, so that every device gives the same bits
    blocks = torch.nn.functional.pad(scales - offset, (0, -len(scales) % BLOCK)).view(-1, BLOCK)
    nested = blocks.abs().amax(1)
    table = dynamic_map(scales.device)
    unit = blocks * (1 / nested.clamp_min(TINY))[:, None]
    codes = torch.bucketize(unit, (table[:-1] + table[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).view(-1)[: len(scales)], nested, offset


def dequantize_scales(codes: Tensor, nested: Tensor, offset: Tensor, *, first: int = 0) -> Tensor:
    """ĉ fp32 [b] of b codes, the first of which is scale number `first`."""
    at = torch.arange(first, first + len(codes), device=codes.device) // BLOCK
    return dynamic_map(codes.device)[codes.int()] * nested[at] + offset
