"""Several adapters' entries to one: tensors [N, …] and weights [N], or [N, …] where every entry has its own -> […].

total       Σ w τ
mean        Σ w τ / Σ w
elected     the sign γ of Σ w τ, or of the most of them; the mean, weighted by |w|, of those w τ that have it (TIES, arXiv:2306.01708)

Of a single adapter `total` makes w τ and `elected` sign(w) τ: in the latter, weights count relative to each other. The authors' code
knows no weights; PEFT's applies them after the election and divides by their number; mergekit's is this one, for positive weights.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Merge = Callable[[Tensor, Tensor], Tensor]
Vote = Literal["total", "frequency"]


def total(values: Tensor, weights: Tensor) -> Tensor:
    """Σ w τ."""
    return (values * _wide(weights, values)).sum(0)


def elected(values: Tensor, weights: Tensor, *, vote: Vote = "total") -> Tensor:
    """The weighted mean of those that agree with the elected sign; + where there is a draw."""
    w = _wide(weights, values)
    weighted = values * w
    votes = weighted if vote == "total" else weighted.sign()
    sign = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(values)
    agree = (weighted * sign).relu_()  # |w τ|, and 0 of those that do not
    divisor = (agree.sign() * w.abs()).sum(0)
    return sign * agree.sum(0) / torch.where(divisor > 0, divisor, 1)


def mean(values: Tensor, weights: Tensor) -> Tensor:
    """Σ w τ / Σ w; 0 where the weights are."""
    w = _wide(weights, values)
    whole = w.sum(0)
    return (values * w).sum(0) / torch.where(whole == 0, 1, whole)


def _wide(weights: Tensor, values: Tensor) -> Tensor:
    return weights.to(values).view(*weights.shape, *[1] * (values.dim() - weights.dim()))
