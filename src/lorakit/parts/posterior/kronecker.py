"""A Gaussian over one matrix parameter: N(θ, (H + I/σ²)⁻¹), H = W Wᵀ ⊗ S with W [d, k] for its long side and S [r, r] for its short one.

By Woodbury, with J [.., r, d] a gradient for the parameter laid out short side first, the covariance of two linear functions of it is

    J Σ J'ᵀ = σ² ⟨J, J'⟩ − σ⁴ Σ_ij λ_i μ_j / (1 + σ² λ_i μ_j) Ĵ_ji Ĵ'_ji        Ĵ = Vᵀ J U

where W Wᵀ = U diag(λ) Uᵀ and S = V diag(μ) Vᵀ: exact for any k, and no matrix of the parameter's size is formed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Kronecker(NamedTuple):
    """The curvature W Wᵀ ⊗ S of one parameter."""

    wide: Tensor
    """W, d × k."""
    square: Tensor
    """S, r × r, positive semidefinite."""

    def eigen(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(U [d, k], λ [k], V [r, r], μ [r])."""
        U, sqrt, _ = torch.linalg.svd(self.wide, full_matrices=False)
        mu, V = torch.linalg.eigh(self.square)
        return U, sqrt.square(), V, mu.clamp_min(0)

    def log_det(self, variance: Tensor) -> Tensor:
        """log det(I + σ² H) for each σ² of `variance` [n]."""
        _, lam, _, mu = self.eigen()
        h = torch.outer(lam, mu).flatten()
        return torch.log1p(variance[:, None] * h).sum(1)

    def covariance(self, J: Tensor, variance: float) -> Tensor:
        """J Σ Jᵀ: J [.., c, r, d] -> [.., c, c]."""
        U, lam, V, mu = self.eigen()
        flat = J.flatten(-2)
        inside = (V.T @ (J @ U)).flatten(-2)
        h = torch.outer(mu, lam).flatten()
        weights = variance**2 * h / (1 + variance * h)
        return variance * flat @ flat.mT - (inside * weights) @ inside.mT


def updated(wide: Tensor, rows: Tensor) -> Tensor:
    """W' [d, k] with W' W'ᵀ the best rank-k approximation of W Wᵀ + rowsᵀ rows: one step of the incremental SVD. rows: [n, d]."""
    U, S, _ = torch.linalg.svd(torch.cat([wide, rows.T], dim=1), full_matrices=False)
    k = min(wide.shape[1], len(S))
    out = torch.zeros_like(wide)
    out[:, :k] = U[:, :k] * S[:k]
    return out
