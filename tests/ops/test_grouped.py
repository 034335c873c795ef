"""The grouped operation against its definition: values, gradients, second derivatives, memory, compilation, experts without a row."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.grouped import _has_kernel, grouped, grouped_outer

ENDS = torch.tensor([3, 3, 4, 9], dtype=torch.int32)  # three rows, none, one, five


def draw(dtype: torch.dtype = torch.float64, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x, W = torch.randn(9, 6, generator=gen), torch.randn(4, 5, 6, generator=gen)
    return x.to(dtype), (W.mT.contiguous().mT if transposed else W).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_values_and_gradients(dtype: torch.dtype, transposed: bool) -> None:
    x, W = (t.requires_grad_() for t in draw(dtype, transposed=transposed))
    found, want = grouped(x, W, ENDS), reference.grouped(x, W, ENDS)
    assert torch.equal(found, want)
    dy = torch.randn(9, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for got, exact in zip(torch.autograd.grad(found, (x, W), dy), torch.autograd.grad(want, (x, W), dy), strict=True):
        torch.testing.assert_close(got, exact)


def test_the_definition_is_each_row_times_its_experts_matrix() -> None:
    x, W = draw()
    expert = [0, 0, 0, 2, 3, 3, 3, 3, 3]
    torch.testing.assert_close(reference.grouped(x, W, ENDS), torch.stack([W[e] @ row for row, e in zip(x, expert, strict=True)]))


@pytest.mark.parametrize("op", [grouped, reference.grouped])
def test_no_rows_at_all(op: Callable[..., Tensor]) -> None:
    _, W = draw()
    assert op(torch.zeros(0, 6, dtype=W.dtype), W, torch.zeros(4, dtype=torch.int32)).shape == (0, 5)


def test_gradients_by_finite_differences() -> None:
    x, W = (t.requires_grad_() for t in draw())
    assert torch.autograd.gradcheck(lambda x, W: grouped(x, W, ENDS), (x, W))
    assert torch.autograd.gradgradcheck(lambda x, W: grouped(x, W, ENDS), (x, W))


def kept_by(x: Tensor, W: Tensor) -> set[int]:
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        grouped(x, W, ENDS)
    return kept


def test_a_frozen_weight_keeps_no_input() -> None:
    x, W = draw()
    pointers = [t.untyped_storage().data_ptr() for t in (x, W)]
    kept = kept_by(x.requires_grad_(), W)
    assert pointers[0] not in kept and pointers[1] in kept
    kept = kept_by(x.detach(), W.requires_grad_())
    assert pointers[0] in kept and pointers[1] not in kept


def test_torch_finds_nothing_wrong_with_it() -> None:
    x, W = (t.requires_grad_() for t in draw())
    torch.library.opcheck(grouped, (x, W, ENDS))
    torch.library.opcheck(grouped_outer, (torch.randn(9, 5), torch.randn(9, 6), ENDS))


def test_it_compiles_whole() -> None:
    x, W = (t.requires_grad_() for t in draw())

    def loss(x: Tensor, W: Tensor) -> Tensor:
        return grouped(x, W, ENDS).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(x, W), (x, W)), torch.autograd.grad(loss(x, W), (x, W)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transposed", [False, True])
def test_torchs_grouped_kernel_means_the_same(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bf16 rows on a GPU go through, here on the CPU."""
    gen = torch.Generator().manual_seed(0)
    x, W = torch.randn(9, 16, generator=gen).bfloat16(), torch.randn(4, 8, 16, generator=gen).bfloat16()
    W = W.mT.contiguous().mT if transposed else W
    monkeypatch.setattr(sys.modules[_has_kernel.__module__], "_has_kernel", lambda x, W: True)
    torch.testing.assert_close(grouped(x, W, ENDS), reference.grouped(x, W, ENDS))
    dy, x = torch.randn(9, 8, generator=gen).bfloat16(), x.requires_grad_()
    (found,) = torch.autograd.grad(grouped(x, W, ENDS), x, dy)
    torch.testing.assert_close(found, torch.autograd.grad(reference.grouped(x, W, ENDS), x, dy)[0])


def test_the_kernel_is_for_aligned_bf16_rows_on_a_gpu() -> None:
    x, W = torch.zeros(9, 16, dtype=torch.bfloat16), torch.zeros(4, 8, 16, dtype=torch.bfloat16)
    assert not _has_kernel(x, W)
