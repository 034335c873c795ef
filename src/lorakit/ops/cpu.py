"""The r-wide products of a fused adapted layer, in torch's own operations; ops/triton.py has the same signatures.

x [n, k], y [n, m], A [r, k], B [m, r] in one compute dtype; accumulation in fp32 where that is narrower. A mask drops entries of the input
without scaling the rest: the caller folds 1 / (1 − p) into what is r wide.
"""

import torch
from torch import Tensor

from lorakit.ops.mask import Mask


def down(x: Tensor, A: Tensor, mask: Mask | None = None) -> Tensor:
    """(keep ∘ x) Aᵀ: [n, r]."""
    return kept(x, mask) @ A.T


def finish_(y: Tensor, u: Tensor, B: Tensor, *, gain: Tensor | None = None, bias: Tensor | None = None, mask: Mask | None = None) -> Tensor:
    """y ← y + keep ∘ (u Bᵀ), and with a gain γ [m] y ← bias + γ ∘ (y − bias), in place: [n, m]. u [n, r], bias [m] as it is in y."""
    if mask is None:
        y.addmm_(u, B.T)
    else:
        change = u @ B.T
        y.add_(change.masked_fill_(~mask.keep(change), 0))
    return y if gain is None else y.addcmul_(y if bias is None else y - bias.to(y.dtype), _less_one(gain, y))


def gained(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """bias + γ ∘ (y − bias), anew: [n, m]."""
    return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), _less_one(gain, y))


def _less_one(gain: Tensor, like: Tensor) -> Tensor:
    """γ − 1, so that y + (γ − 1) y keeps digits that γ itself loses in a narrow dtype."""
    return (gain - 1).to(like.dtype)


def outer(dz: Tensor, x: Tensor, mask: Mask | None = None) -> Tensor:
    """dzᵀ (keep ∘ x): [r, k]."""
    return dz.T @ kept(x, mask)


def kept(x: Tensor, mask: Mask | None) -> Tensor:
    """x without what the mask drops."""
    return x if mask is None else torch.where(mask.keep(x), x, 0)
