"""The NF4 format: sixteen levels at quantiles of a normal distribution, one scale for each block of a flat tensor.

    c_b = max |x| over block b        q_i = the level nearest to x_i / c_b        x̂_i = L[q_i] · c_b        (all in fp32)

Blocks run over the flat row-major tensor; one may cross rows and the last may be short. Two codes share a byte, the first in its high
half; an odd tensor ends in the code of 0. Codes, scales and x̂ equal bitsandbytes' bit for bit (a value midway takes the lower level).
References: QLoRA, arXiv:2305.14314, section 3; the levels are those of bitsandbytes, Φ⁻¹ on a grid that ends at OFFSET and has an exact 0.
"""

from statistics import NormalDist

import torch
from torch import Tensor

from lorakit.core.errors import BadParameter

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
OFFSET = 0.9677083
"""The last probability of the grid: 1 − (1/32 + 1/30) / 2."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CHUNK = 2**20
"""Entries that are quantized at a time, whole blocks of any size: what they need for a moment stays small."""
TINY = 1e-38
"""Stands in for the scale of a block of zeros."""


def normal_float(bits: int) -> Tensor:
    """The 2^bits levels of NFk, fp32: half of them above an exact 0. `normal_float(4)` is LEVELS, bit for bit."""
    half = 2 ** (bits - 1)
    above = [NormalDist().inv_cdf(p) for p in torch.linspace(OFFSET, 0.5, half + 1)[:-1].tolist()]
    below = [-NormalDist().inv_cdf(p) for p in torch.linspace(OFFSET, 0.5, half)[:-1].tolist()]
    levels = torch.tensor([*above, 0.0, *below]).sort().values  # the division must be that of fp32 values
    return levels / levels.max()


def quantize(x: Tensor, *, blocksize: int = 64, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], scales fp32 [⌈n / blocksize⌉]) of a tensor of n entries, flat. Raises BadParameter for NaN and infinity."""
    levels = torch.tensor(LEVELS, device=x.device) if levels is None else levels.to(x.device)
    parts = [_quantize(part, blocksize, levels) for part in x.detach().reshape(-1).split(CHUNK)]
    codes, scales = (torch.cat(found) for found in zip(*parts, strict=True))
    if not torch.isfinite(scales).all():
        raise BadParameter(f"a weight of shape {tuple(x.shape)} holds NaN or infinite values and cannot be quantized")
    return codes, scales


def _quantize(flat: Tensor, blocksize: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _blocks(flat.to(torch.float32), blocksize)
    scales = blocks.abs().amax(1)
    unit = (blocks * (1 / scales.clamp_min(TINY))[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).view(-1)[: len(flat)], scales


def dequantize(codes: Tensor, scales: Tensor, *, blocksize: int = 64, levels: Tensor | None = None) -> Tensor:
    """x̂ fp32 [n] of what `quantize` gave."""
    levels = torch.tensor(LEVELS, device=codes.device) if levels is None else levels.to(codes.device)
    return rescaled(levels[codes.int()], scales, blocksize)


def rescaled(unit: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """L[q] · c by blocks, in place: [n]."""
    whole = unit.numel() // blocksize
    unit[: whole * blocksize].view(-1, blocksize).mul_(scales[:whole, None])
    if whole < len(scales):
        unit[whole * blocksize :].mul_(scales[whole])
    return unit


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte: uint8 [⌈n / 2⌉, 1]."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), LEVELS.index(0.0))])
    return (codes[0::2] << 4 | codes[1::2])[:, None]


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n codes of what `pack` gave: uint8 [n]."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).view(-1)[:n]


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    """[⌈n / blocksize⌉, blocksize], the end filled with zeros, which change no scale."""
    missing = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, blocksize)
