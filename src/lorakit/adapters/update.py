"""The algebra of a site's update s·B·A, in fp64 on r-wide matrices: sums, inner products, spectra, truncation. ΔW is not formed.

    s·B·A = Q_B (s R_B R_Aᵀ) Q_Aᵀ        B = Q_B R_B,  Aᵀ = Q_A R_A

Everything but `norm` and `singular_values` is two-dimensional: of a stack of experts each is a site by itself (mix/parts.py).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.delta import Factors
from lorakit.core.errors import AdapterMismatch

OVERSAMPLING, ROUNDS = 10, 2
"""Of the range finder (arXiv:0909.4061): columns beyond the rank, and power iterations."""


def joined(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ w s B A, exactly, as one pair with s = 1: [A₁; A₂; …] and [w₁s₁B₁, w₂s₂B₂, …]; no wider than the matrix itself."""
    used = [(f, w) for f, w in zip(parts, weights, strict=True) if w != 0] or [(parts[0], 0.0)]
    whole = Factors(torch.cat([f.A.double() for f, _ in used]), torch.cat([w * f.s * f.B.double() for f, w in used], 1), 1.0)
    limit = min(whole.A.shape[1], len(whole.B))
    return truncated(whole, limit)[0] if len(whole.A) > limit else whole


def inner(one: Factors, other: Factors) -> float:
    """⟨ΔW₁, ΔW₂⟩ = s₁ s₂ tr((B₁ᵀ B₂)(A₂ A₁ᵀ))."""
    product = (one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)
    return one.s * other.s * product.sum().item()


def decomposed(f: Factors, q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, q], σ [k], V [d_in, q] of s·B·A, k = min(r, d_out, d_in): all σ, and the vectors of the q largest or of all."""
    (turn_B, R_B), (turn_A, R_A) = _qr(f.B), _qr(f.A.T)
    U, S, Vh = torch.linalg.svd(f.s * (R_B @ R_A.T), full_matrices=False)
    return turn_B(U[:, :q]), S, turn_A(Vh[:q].T)


def truncated(f: Factors, q: int) -> tuple[Factors, float]:
    """The closest update of rank q (Eckart-Young), and the norm of what it leaves out, both sides sharing √σ."""
    U, S, V = decomposed(f, q)
    root = S[:q].sqrt()
    return Factors((V * root).T.contiguous(), (U * root).contiguous(), 1.0), S[q:].norm().item()


def _qr(M: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(what multiplies by Q [d, k], R [k, r]) of M [d, r]. Q stays the product of reflections that it is found as: to form it, and then to
    multiply by it, is twice the work."""
    reflections, sizes = torch.geqrf(M.double())
    k = len(sizes)

    def turn(C: Tensor) -> Tensor:
        return torch.ormqr(reflections[:, :k], sizes, F.pad(C, (0, 0, 0, len(reflections) - k)))

    return turn, reflections[:k].triu()


def norm(f: Factors) -> float:
    """‖s·B·A‖, Frobenius; of a stack that of all experts together. Exact to rounding also where B and A nearly cancel."""
    return float(_core(f).norm())


def singular_values(f: Factors) -> Tensor:
    """σ of s·B·A, largest first: [min(r, d_in, d_out)]; of a stack those of every expert, E times as many."""
    values: Tensor = torch.linalg.svdvals(_core(f))
    return values.flatten().sort(descending=True).values


def _core(f: Factors) -> Tensor:
    """s R_B R_Aᵀ. Raises AdapterMismatch where it is not finite, as finite factors under a hostile scale are."""
    left, right = (torch.linalg.qr(M.double(), mode="r").R for M in (f.B, f.A.mT))
    core: Tensor = f.s * (left @ right.mT)
    if not core.isfinite().all():
        raise AdapterMismatch(f"an update is not finite: its scale is {f.s:g}")
    return core


def low_rank(W: Tensor, q: int, rng: torch.Generator) -> tuple[Factors, float]:
    """An update of rank q close to W [d_out, d_in], and the norm of what it leaves out: a randomized range finder (arXiv:0909.4061,
    algorithms 4.4 and 5.1). It leaves out nothing that counts where W has no more than q + 10 large singular values."""
    columns = min(q + OVERSAMPLING, *W.shape)
    Y = W @ torch.randn(W.shape[1], columns, generator=rng, dtype=W.dtype)
    for _ in range(ROUNDS):
        Y = W @ torch.linalg.qr(W.T @ torch.linalg.qr(Y).Q).Q
    Q = torch.linalg.qr(Y).Q
    inside = Q.T @ W
    f, tail = truncated(Factors(inside, Q, 1.0), q)
    rest = math.hypot(*((w - p @ inside).double().norm().item() for w, p in zip(W.split(1024), Q.split(1024), strict=True)))
    return f, math.hypot(tail, rest)
