"""DualGPM: which directions of a layer's inputs earlier tasks use.

    after a task with H = Σ x xᵀ [d, d]: the left singular vectors of (I − M Mᵀ) H join M one by one until ‖M Mᵀ H‖² ≥ ε ‖H‖²

M is kept by a basis of itself or, once it is more than half of the space, of its complement, so never more than d²/2 numbers; all in fp64
on the CPU. The energy ‖H‖² sums σ⁴ of the inputs. References: Liang and Li, CVPR 2023 (from memory); arXiv:2404.00228.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """The directions [d] that earlier tasks use, by an orthonormal basis [d, m] of them or, where that is smaller, of their complement."""

    basis: Tensor
    free: bool
    """Whether `basis` spans the complement."""

    @classmethod
    def empty(cls, d: int) -> "Memory":
        """Nothing is used yet."""
        return cls(torch.zeros(d, 0, dtype=torch.float64), free=False)

    @classmethod
    def of(cls, used: Tensor, left: Tensor) -> "Memory":
        """The smaller of the two bases."""
        return cls(left, free=True) if used.shape[1] > left.shape[1] else cls(used, free=False)

    def used(self) -> Tensor:
        """An orthonormal basis of the used directions: [d, u]."""
        return _complement(self.basis) if self.free else self.basis

    def left(self) -> Tensor:
        """An orthonormal basis of the free directions: [d, d − u]."""
        return self.basis if self.free else _complement(self.basis)

    def ranked(self, H: Tensor) -> tuple[Tensor, Tensor]:
        """(U [d, d − u], energies [d − u]): the left singular vectors of (I − M Mᵀ) H that are free, and their squared singular values,
        largest first."""
        F = self.left()
        C = F.T @ H.to(F.dtype)
        energy, U = torch.linalg.eigh(C @ C.T)
        return F @ U.flip(1), energy.flip(0).clamp_min(0)

    def grown(self, H: Tensor, threshold: float) -> "Memory":
        """With the fewest directions added that let it hold `threshold` of ‖H‖²."""
        U, energy = self.ranked(H)
        total = H.to(U.dtype).square().sum()
        outside = total * (1 - threshold) + total * torch.finfo(U.dtype).eps * len(H)
        rest = energy.sum() - torch.cat([energy.new_zeros(1), energy.cumsum(0)])
        n = int((rest > outside).sum())
        return Memory.of(torch.cat([self.used(), U[:, :n]], 1), U[:, n:])


def _complement(Q: Tensor) -> Tensor:
    """An orthonormal basis [d, d − m] of what is orthogonal to the orthonormal columns of Q [d, m]."""
    whole: Tensor = torch.linalg.qr(Q, mode="complete").Q
    return whole[:, Q.shape[1] :]
