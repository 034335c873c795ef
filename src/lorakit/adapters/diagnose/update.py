"""One weight's update as the diagnostics see it: B·A where there are factors, ΔW itself where there are none. Everything is in fp64.

    ΔW = B·A = U diag(σ) Vᵀ        U: d_out × k, σ: k, V: d_in × k, k = rank(ΔW)

Of a stack of experts each is an update of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.update import decomposed
from lorakit.core.delta import Factors

EXACT = torch.finfo(torch.float64).eps


class Thin(NamedTuple):
    """The singular value decomposition without what is zero up to rounding; it may be empty."""

    U: Tensor
    """d_out × k, orthonormal columns."""
    S: Tensor
    """k, largest first."""
    V: Tensor
    """d_in × k, orthonormal columns."""

    @property
    def rank(self) -> int:
        """k."""
        return len(self.S)


@dataclass(frozen=True)
class Update:
    """ΔW of one weight."""

    B: Tensor
    """d_out × r, the scale folded in; ΔW itself where A is None."""
    A: Tensor | None = None
    """r × d_in."""
    eps: float = EXACT
    """Relative rounding of what ΔW is made of."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.B), (self.B if self.A is None else self.A).shape[1]

    def rows(self, at: slice) -> Tensor:
        """Some rows of ΔW, exact zeros where they are zero up to rounding: [rows, d_in]."""
        if self.A is None:
            return self.B[at]
        rows = self.B[at] @ self.A
        return rows.masked_fill_(rows.abs() <= self._rounding, 0.0)

    @cached_property
    def thin(self) -> Thin:
        """By QR of the factors and the SVD of an r × r core; a ΔW without factors is decomposed whole."""
        if self.A is None:
            U, S, Vh = torch.linalg.svd(self.B, full_matrices=False)
            V, size = Vh.T, S.max().item()
        else:
            U, S, V = decomposed(Factors(self.A, self.B, 1.0))
            size = (self.B.norm() * self.A.norm()).item()
        k = int(S.gt(max(self.shape) * self.eps * size).sum())
        return Thin(U[:, :k], S[:k], V[:, :k])

    @cached_property
    def _rounding(self) -> float:
        """Bounds the rounding of an entry of B·A."""
        assert self.A is not None
        return len(self.A) * self.eps * float(self.B.norm(dim=1).max() * self.A.norm(dim=0).max())

    def spread(self, rows: Tensor, d_out: int) -> "Update":
        """As an update of a larger weight, of which these are the rows `rows` (of a fused weight: one part)."""
        return Update(self.B.new_zeros(d_out, self.B.shape[1]).index_copy(0, rows, self.B), self.A, self.eps)


def factored(f: Factors) -> list[Update]:
    """s·B·A; of a stack one for each expert."""
    pairs = [(f.B, f.A)] if f.A.ndim == 2 else list(zip(f.B, f.A, strict=True))
    return [Update(f.s * B.detach().double(), A.detach().double()) for B, A in pairs]


def whole(W: Tensor) -> list[Update]:
    """A change of the weight without factors; of a stack one for each expert."""
    eps = torch.finfo(W.dtype).eps
    return [Update(part.detach().double(), None, eps) for part in (W.unbind() if W.ndim == 3 else [W])]


def together(parts: Sequence[Update]) -> Update:
    """The sum of several updates of one weight, all with factors or all without."""
    if len(parts) == 1:
        return parts[0]
    A = [part.A for part in parts if part.A is not None]
    B = [part.B for part in parts]
    eps = max(part.eps for part in parts)
    return Update(torch.cat(B, dim=1), torch.cat(A), eps) if A else Update(torch.stack(B).sum(0), None, eps)
