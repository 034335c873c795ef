"""The Gaussian over one matrix: Woodbury against a dense inverse, and the incremental SVD against the batch one."""

import pytest
import torch

from lorakit.parts.posterior import kronecker
from lorakit.parts.posterior.kronecker import Kronecker, updated
from tests.laws.subject import far
from tests.methods.tools import normal

D, R, C = 7, 3, 4


def curvature(k: int = 2) -> Kronecker:
    root = normal(R, R, seed=5)
    return Kronecker(normal(D, k, seed=4), root @ root.T)


def dense(k: Kronecker) -> torch.Tensor:
    """H over the parameter [r, d] flattened: S ⊗ W Wᵀ."""
    return torch.kron(k.square, k.wide @ k.wide.T)


def error(k: Kronecker, variance: float) -> float:
    J = normal(2, C, R, D, seed=6)
    precision = dense(k) + torch.eye(R * D, dtype=torch.float64) / variance
    want = J.flatten(-2) @ torch.linalg.inv(precision) @ J.flatten(-2).mT
    return far(k.covariance(J, variance), want)


@pytest.mark.parametrize("k", [1, 2, D])
def test_woodbury_equals_the_dense_inverse(k: int) -> None:
    for variance in (0.01, 1.0, 30.0):
        assert error(curvature(k), variance) < 1e-10


def test_mutants_of_woodbury() -> None:
    k = curvature()
    for wrong in (Kronecker(k.wide, k.square * 1.01), Kronecker(k.wide[:, :1], k.square)):
        J = normal(2, C, R, D, seed=6)
        assert far(wrong.covariance(J, 1.0), k.covariance(J, 1.0)) > 1e-5


def test_the_log_determinant_is_that_of_the_dense_matrix() -> None:
    k, variance = curvature(), torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
    eye = torch.eye(R * D, dtype=torch.float64)
    want = torch.stack([torch.logdet(eye + v * dense(k)) for v in variance])
    assert far(k.log_det(variance), want) < 1e-12


def incremental(rank: int, k: int) -> float:
    rows = normal(40, rank, seed=1) @ normal(rank, D, seed=2)
    wide = torch.zeros(D, k, dtype=torch.float64)
    for part in rows.split(6):
        wide = updated(wide, part)
    return far(wide @ wide.T, rows.T @ rows)


def test_the_incremental_svd_equals_the_batch_one_where_k_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert incremental(3, 3) < 1e-12
    assert incremental(3, 5) < 1e-12
    assert incremental(7, 7) < 1e-12
    assert incremental(5, 3) > 1e-3, "what is left out shows"
    monkeypatch.setattr(torch.linalg, "svd", lambda m, full_matrices: (torch.linalg.qr(m)[0], torch.ones(D, dtype=m.dtype), m))
    assert kronecker.updated(torch.zeros(D, 3, dtype=torch.float64), normal(4, D)).shape == (D, 3)
    assert incremental(3, 3) > 1e-3
