"""Randomness that replays: init draws from a CPU generator, masks inside forward are a pure function of (seed, step, site).

The mask is a custom op so that it compiles under fullgraph, recomputes identically under activation checkpointing, and resumes exactly.
It draws 16-bit integers, four per generator word, and compares: the keep probability is exact to 2⁻¹⁶ and the mask is scaled by its own
keep probability, so E[mask] = 1 exactly.
"""

import hashlib

import torch
from torch import Tensor

from lorakit.core.errors import BadParameter

STEPS = 65536
_MIX = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one site's init: the same bits on CPU and GPU, and independent of which other sites are adapted."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stream(name: str) -> int:
    """A stable 62-bit number for a site's name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 2


def mixed(seed: int, step: int, site: int) -> int:
    """One 63-bit generator seed from (seed, step, site), by splitmix64 rounds."""
    z = 0
    for word in (seed, step, site):
        z = (z + word + _MIX) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        z ^= z >> 31
    return z >> 1


def check_dropout(p: float) -> None:
    """Raise BadParameter for what is no probability of dropping."""
    if not 0 <= p < 1:
        raise BadParameter(f"dropout={p} is not a probability; expected 0 <= dropout < 1")


@torch.library.custom_op("lorakit::dropout_mask", mutates_args=())
def dropout_mask(like: Tensor, key: Tensor, site: int, p: float) -> Tensor:
    """A mask of `like`'s shape and dtype: 0 with probability p, else 1/(1-p). `key` is int64 [seed, step] on the CPU."""
    seed, step = key.tolist()
    gen = torch.Generator(device=like.device).manual_seed(mixed(seed, step, site))
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=gen)
    draws = words.view(torch.int16)[: like.numel()].view(like.shape)
    dropped = min(round(p * STEPS), STEPS - 1)
    keep = draws >= dropped - STEPS // 2
    return keep.to(like.dtype).mul_(STEPS / (STEPS - dropped))


@dropout_mask.register_fake
def _(like: Tensor, key: Tensor, site: int, p: float) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def dropout(x: Tensor, key: Tensor, site: int, p: float) -> Tensor:
    """Inverted dropout of x whose mask is a pure function of (seed, step, site)."""
    return x * dropout_mask(x.detach(), key, site, p)  # type: ignore[no-any-return]
