"""From logits over N experts to gates: dense softmax, and the k largest.

    g = softmax(λ / τ)        [.., N], at least in fp32

What is kept of a gate's entries is a mask, not "unequal to zero": a gate may be zero and chosen.
"""

import torch
from torch import Tensor


def dense(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(λ / τ) over the last dimension, at least in fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.softmax(wide / temperature, dim=-1)


def largest(g: Tensor, k: int) -> Tensor:
    """Which entries are among the k largest of the last dimension: bool [.., N]."""
    return torch.zeros_like(g, dtype=torch.bool).scatter(-1, g.topk(k, dim=-1).indices, True)


def kept(g: Tensor, mask: Tensor) -> Tensor:
    """The entries of the mask as they are, the others zero: what is left out is not shared among the rest."""
    return g.masked_fill(~mask, 0.0)


def shared(g: Tensor, mask: Tensor) -> Tensor:
    """softmax over the entries of the mask alone, the others zero."""
    return torch.softmax(g.masked_fill(~mask, -torch.inf), dim=-1)
