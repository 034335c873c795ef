"""The definitions against dense arithmetic (fp64)."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.ops import reference as ops

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))


def draw(sizes: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W [d_out, d_in], A [r, d_in], B [d_out, r], x [2, 3, d_in]."""
    d_out, d_in, r, seed = sizes
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=gen, dtype=torch.float64) for s in ((d_out, d_in), (r, d_in), (d_out, r), (2, 3, d_in)))  # type: ignore[return-value]


@given(SIZES, st.floats(-4, 4))
def test_project_and_expand_are_the_dense_update(sizes: tuple[int, int, int, int], s: float) -> None:
    _, A, B, x = draw(sizes)
    torch.testing.assert_close(ops.expand(ops.project(x, A), B, s), x @ (s * B @ A).T)


@given(SIZES)
def test_ids_are_one_hot_rows(sizes: tuple[int, int, int, int]) -> None:
    _, A, _, _ = draw(sizes)
    ids = torch.randint(A.shape[1], (2, 3), generator=torch.Generator().manual_seed(sizes[3]))
    torch.testing.assert_close(ops.project(ids, A), torch.nn.functional.one_hot(ids, A.shape[1]).double() @ A.T)


@given(SIZES, st.floats(-4, 4))
def test_row_norm_is_that_of_the_dense_sum(sizes: tuple[int, int, int, int], s: float) -> None:
    W, A, B, _ = draw(sizes)
    found = ops.row_norm(W.square().sum(1), W @ A.T, A, B, s)
    torch.testing.assert_close(found, (W + s * B @ A).norm(dim=1), atol=1e-7, rtol=1e-9)


def test_row_norm_of_a_sum_that_cancels_is_zero_and_never_nan() -> None:
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    W = -(B @ A)
    found = ops.row_norm(W.square().sum(1), W @ A.T, A, B, 1.0)
    assert found.isfinite().all()
    assert found.max() < 1e-2


@given(SIZES, st.floats(-4, 4))
def test_kronecker_is_the_dense_product_in_either_order(sizes: tuple[int, int, int, int], s: float) -> None:
    b1, b2, a2, seed = sizes
    a1 = 1 + seed % 9
    gen = torch.Generator().manual_seed(seed)
    w1, w2, x = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in ((a1, a2), (b1, b2), (2, 3, a2 * b2)))
    dense = s * torch.kron(w1, w2)
    torch.testing.assert_close(ops.kronecker(x, w1, w2, s), x @ dense.T)
    ids = torch.randint(a2 * b2, (2, 3), generator=gen)
    torch.testing.assert_close(ops.kronecker(ids, w1, w2, s), dense.T[ids])
