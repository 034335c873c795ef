"""Randomness that replays: init draws from a CPU generator, masks inside forward are a pure function of (seed, step, site) (ops/mask.py).

A mask is scaled by its own keep probability, so E[mask] = 1 exactly.
"""

import hashlib

import torch
from torch import Tensor

from lorakit.core.errors import BadParameter
from lorakit.ops.mask import Mask, mixed

__all__ = ["Mask", "check_dropout", "dropout", "dropout_mask", "generator", "mixed", "stream"]


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one site's init: the same bits on CPU and GPU, and independent of which other sites are adapted."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stream(name: str) -> Tensor:
    """A stable 62-bit number for a site's name, as int64 [] on the CPU: an int would be compiled in, and every layer compiled by itself."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 2
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def check_dropout(p: float) -> None:
    """Raise BadParameter for what is no probability of dropping."""
    if not 0 <= p < 1:
        raise BadParameter(f"dropout={p} is not a probability; expected 0 <= dropout < 1")


def dropout_mask(like: Tensor, key: Tensor, site: Tensor, p: float) -> Tensor:
    """A mask of `like`'s shape and dtype: 0 with probability p, else 1/(1-p). `key` is int64 [seed, step] on the CPU."""
    mask = Mask(key, site, p)
    return mask.keep(like).to(like.dtype) * mask.scale


def dropout(x: Tensor, key: Tensor, site: Tensor, p: float) -> Tensor:
    """Inverted dropout of x whose mask is a pure function of (seed, step, site)."""
    return Mask(key, site, p).drop(x)
