"""The thin decomposition is the dense one's, at the price of its factors; what is zero up to rounding is zero."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.diagnose.update import EXACT, Update, factored, together, whole
from lorakit.core.delta import Factors

SIDES = st.integers(1, 9)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(SIDES, SIDES, st.integers(1, 12), st.integers(0, 99), st.sampled_from([1.0, -2.0, 0.01]))
def test_thin_is_the_dense_decomposition(d_out, d_in, r, seed, s):
    A, B = draw(seed, r, d_in), draw(seed + 1, d_out, r)
    (update,) = factored(Factors(A, B, s))
    W = s * B.double() @ A.double()
    U, S, V = update.thin
    assert update.thin.rank == min(r, d_in, d_out)
    torch.testing.assert_close(U * S @ V.T, W)
    torch.testing.assert_close(U.T @ U, torch.eye(len(S), dtype=torch.float64))
    torch.testing.assert_close(V.T @ V, torch.eye(len(S), dtype=torch.float64))
    assert (S.diff() <= 0).all()
    torch.testing.assert_close(update.rows(slice(1, 4)), W[1:4])
    assert update.shape == (d_out, d_in)


def test_of_factors_only_cores_are_decomposed(monkeypatch):
    sides, real = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **kwargs: sides.append(tuple(M.shape)) or real(M, **kwargs))
    (update,) = factored(Factors(draw(0, 3, 60), draw(1, 50, 3), 1.0))
    assert update.thin.rank == 3
    assert sides == [(3, 3)]


def test_directions_of_rounding_are_left_out():
    A, B = draw(0, 2, 7), draw(1, 8, 2)
    doubled = Factors(torch.cat([A, A[:1]]), torch.cat([B, B[:, :1]], 1), 1.0)
    assert factored(doubled)[0].thin.rank == 2
    assert factored(Factors(A, B * torch.tensor([1.0, 0.0]), 1.0))[0].thin.rank == 1


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
def test_what_cancels_is_zero(size):
    """A fresh PiSSA adapter: [B, −B] [A; A]."""
    A, B = draw(0, 3, 31), size * draw(1, 23, 3)
    (update,) = factored(Factors(torch.cat([A, A]), torch.cat([B, -B], 1), 2.0))
    assert update.thin.rank == 0
    assert not update.rows(slice(None)).any()
    assert (update.B @ update.A).abs().max() < 1e-14 * size * 31


def test_small_is_not_zero():
    (update,) = factored(Factors(draw(0, 3, 31), 1e-30 * draw(1, 23, 3), 1.0))
    assert update.thin.rank == 3
    assert update.rows(slice(None)).all()


def test_without_factors_the_matrix_is_decomposed_to_its_own_rounding():
    W = draw(1, 8, 3) @ draw(0, 3, 7)  # of rank 3 up to the rounding of fp32
    (update,) = whole(W)
    assert update.thin.rank == 3
    assert Update(W.double(), None, EXACT).thin.rank > 3
    torch.testing.assert_close(update.rows(slice(None)), W.double())
    assert whole(torch.zeros(3, 4))[0].thin.rank == 0


def test_of_a_stack_every_expert_is_one():
    A, B = draw(0, 4, 2, 7), draw(1, 4, 8, 2)
    found = factored(Factors(A, B, 0.5))
    assert len(found) == len(whole(B @ A)) == 4
    for e, update in enumerate(found):
        torch.testing.assert_close(update.rows(slice(None)), 0.5 * B[e].double() @ A[e].double())
        torch.testing.assert_close(whole(B @ A)[e].rows(slice(None)), (B[e] @ A[e]).double())


@pytest.mark.parametrize("factors", [True, False])
def test_parts_of_a_fused_weight_make_the_whole(factors):
    rows = [torch.tensor([0, 1, 4]), torch.tensor([2, 5])]
    parts = [Factors(draw(i, 2, 7), draw(i + 5, len(at), 2), 0.5) for i, at in enumerate(rows)]
    dense = torch.zeros(6, 7, dtype=torch.float64)
    for at, f in zip(rows, parts, strict=True):
        dense[at] = 0.5 * f.B.double() @ f.A.double()
    updates = [factored(f)[0] if factors else Update(f.s * f.B.double() @ f.A.double()) for f in parts]
    joined = together([u.spread(at, 6) for u, at in zip(updates, rows, strict=True)])
    torch.testing.assert_close(joined.rows(slice(None)), dense)
    assert (joined.A is not None) == factors
