"""Dropout masks that are counted, not drawn: a pure function of (seed, step, site) and the position.

Byte i of a mask is byte i mod 8 of a 64-bit hash of (key, i // 8), so that every device gives the same bits and a kernel can make them in
registers. A byte below its row's threshold is dropped. p · 256 is no whole number: a row's threshold is one of the two beside it, by the
row's own hash, so that every entry is dropped with probability p (to 2⁻¹⁶). It is a custom op so that it compiles under fullgraph and
recomputes alike under activation checkpointing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 65536
_MIX = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_ROWS = 0x5851F42D4C957F2D
_BLOCK = 2**17
"""Words hashed at a time: what a CPU's cache holds."""


class Mask(NamedTuple):
    """What an input dropout keeps at one site in one step."""

    key: Tensor
    """int64 [seed, step] on the CPU."""
    site: Tensor
    """The site's number, int64 [] on the CPU."""
    p: float
    made: Tensor | None = None
    """Which entries of one x stay, where that is wanted more than once."""

    @property
    def scale(self) -> float:
        """1 / (1 − p) of the p that is dropped."""
        return STEPS / (STEPS - steps(self.p))

    def keep(self, x: Tensor) -> Tensor:
        """Which entries of x stay: bool, of x's shape."""
        if self.made is not None:
            return self.made
        return keep_mask(x, self.key, self.site, self.p)  # type: ignore[no-any-return]

    def made_for(self, x: Tensor) -> "Mask":
        """The same, its entries for this x at hand."""
        return self._replace(made=self.keep(x))

    def drop(self, x: Tensor) -> Tensor:
        """Inverted dropout of x."""
        return torch.where(self.keep(x.detach()), x * self.scale, 0)


def steps(p: float) -> int:
    """p in steps of 2⁻¹⁶, not all of them."""
    return min(round(p * STEPS), STEPS - 1)


def mixed(seed: int, step: int, site: int) -> int:
    """One 63-bit generator seed from (seed, step, site), by splitmix64 rounds."""
    z = 0
    for word in (seed, step, site):
        z = (z + word + _MIX) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        z ^= z >> 31
    return z >> 1


@torch.library.custom_op("lorakit::keep_mask", mutates_args=())
def keep_mask(like: Tensor, key: Tensor, site: Tensor, p: float) -> Tensor:
    """A bool tensor of `like`'s shape: False with probability p. `key` is int64 [seed, step], `site` int64 [], both on the CPU."""
    seed, step = key.tolist()
    number = mixed(seed, step, int(site))
    threshold, fraction = divmod(steps(p), 256)
    width = like.shape[-1] if like.dim() else 1
    rows = like.numel() // max(1, width)
    draws = hashed(number, -(-like.numel() // 8), like.device).view(torch.uint8)[: like.numel()].view(rows, width)
    if not fraction:
        return (draws >= threshold).view(like.shape)
    limits = threshold + ((hashed(number ^ _ROWS, rows, like.device) & 255) < fraction)
    return (draws >= limits.to(torch.uint8 if threshold < 255 else torch.int16)[:, None]).view(like.shape)


@keep_mask.register_fake
def _(like: Tensor, key: Tensor, site: Tensor, p: float) -> Tensor:
    return torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)


def hashed(key: int, n: int, device: torch.device) -> Tensor:
    """n words, int64: splitmix64's output after 1, 2, … n steps from `key`."""
    out = torch.empty(n, dtype=torch.int64, device=device)
    shifted = torch.empty(min(n, _BLOCK), dtype=torch.int64, device=device)
    for start in range(0, n, _BLOCK):
        z = out[start : start + _BLOCK]
        t = shifted[: len(z)]
        torch.arange(start + 1, start + 1 + len(z), out=z)
        z.mul_(_signed(_MIX)).add_(_signed(key))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            torch.bitwise_right_shift(z, shift, out=t).bitwise_and_(_WORD >> shift)  # torch's own shift fills with the sign
            z.bitwise_xor_(t).mul_(_signed(factor))
    return out


def _signed(word: int) -> int:
    """An unsigned 64-bit word as int64 has it."""
    return word - (1 << 64) if word >> 63 else word
