"""The largest singular triplets of a matrix, exactly or by randomized subspace iteration."""

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]


def principal(W: Tensor, r: int, niter: int, rng: torch.Generator, *, spare: int = 8) -> Triplets:
    """(U [d_out, r], S [r], Vᵀ [r, d_in]) of the r largest triplets, at least in fp32; randomized with niter > 0."""
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if niter == 0 or r + spare >= min(W.shape):  # as many test vectors as the matrix has ranks: nothing would be saved
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    # Halko, Martinsson, Tropp (2011): r + spare test vectors drawn from our generator, orthonormalized between the iterations
    Q = torch.empty(W.shape[1], r + spare, dtype=W.dtype).normal_(generator=rng)
    Q = torch.linalg.qr(W @ Q).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ U)[:, :r], S[:r], Vh[:r]


def signs(rows: Tensor) -> Tensor:
    """±1 for each row [r, 1], by which its largest entry becomes positive: what LAPACK leaves open, and differs by build."""
    return rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


def signed(U: Tensor, S: Tensor, Vh: Tensor) -> Triplets:
    """The same triplets with the largest entry of every row of Vᵀ positive."""
    return U * signs(Vh).T, S, Vh * signs(Vh)
