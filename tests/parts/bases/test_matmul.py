"""x W̃ᵀ and its gradient dy W̃, from the codes: exact, of any order, and with nothing dense in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.parts.bases import matmul, nf4, packed
from lorakit.parts.bases.matmul import nf4_dense, nf4_matmul
from lorakit.parts.bases.packed import Layout, Packed
from lorakit.train.memory import _cpu_peak
from tests.parts.bases.oracle import weight

SHAPES = ((64, 96), (33, 65), (7, 13), (48, 128))


def made(shape: tuple[int, int], dtype: torch.dtype = torch.float64, *, double_quant: bool = True) -> tuple[tuple[Any, ...], Tensor]:
    """(the arguments of a product after x and before its orientation, W̃)."""
    held = Packed.of(weight(*shape, dtype=dtype, std=1.0), Layout(*shape, dtype, 64, double_quant))
    return (*held, *shape, dtype, 64), nf4_dense(*held, *shape, dtype, 64)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check_product(shape: tuple[int, int], dtype: torch.dtype, call: Callable[..., Tensor]) -> None:
    """Of one tile both are the very product with W̃; the leading dimensions are free."""
    args, W = made(shape, dtype)
    x = normal(2, 5, shape[1], dtype=dtype).requires_grad_()
    y = call(x, *args, False)
    dy = normal(2, 5, shape[0], dtype=dtype, seed=2)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, (x.view(10, -1) @ W.T).view(2, 5, -1))
    assert torch.equal(dx, (dy.view(10, -1) @ W).view(2, 5, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_and_its_gradient_are_those_with_the_decoded_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_product(shape, dtype, nf4_matmul)


def test_mutants_of_the_product_are_seen() -> None:
    with pytest.raises(AssertionError):
        check_product((33, 65), torch.float64, lambda x, *args: nf4_matmul(x.detach(), *args) + 0 * x.sum())
    with pytest.raises(AssertionError):
        check_product((33, 65), torch.float64, lambda x, *args: nf4_matmul(x, *args) + x.sum())


def check_near(shape: tuple[int, int]) -> None:
    """W̃ is W but for the grid, whose mean error is about a tenth of a Gaussian weight."""
    W = weight(*shape, std=1.0)
    assert (made(shape, torch.float32)[1] - W).norm() / W.norm() < 0.15


@pytest.mark.parametrize("shape", [(64, 96), (64, 80), (64, 48), (96, 160), (32, 32)])
def test_rows_that_are_no_whole_blocks_decode_right(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes at which bitsandbytes 0.50.2 is wrong on AVX-512. The mutant does what it does: every row begins a block."""
    check_near(shape)
    d_out, d_in = shape

    def by_rows(unit: Tensor, scales: Tensor, size: int) -> Tensor:
        index = torch.arange(d_out)[:, None] * (d_in // size) + torch.arange(d_in) // size
        return unit * scales[index.view(-1).clamp(max=len(scales) - 1)]

    monkeypatch.setattr(nf4, "rescaled", by_rows)
    with pytest.raises(AssertionError):
        check_near(shape)


def test_several_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.bfloat16, 1e-2)):
        args, W = made((200, 96), dtype)
        x, dy = normal(3, 96, dtype=dtype), normal(3, 200, dtype=dtype)
        monkeypatch.setitem(packed.TILES, "cpu", 1000)
        assert len(Layout(200, 96, dtype).tiles(x.device)) > 10
        for got, want in ((nf4_matmul(x, *args, False), x @ W.T), (nf4_matmul(dy, *args, True), dy @ W)):
            assert (got - want).abs().max() <= tolerance * want.abs().max()
        monkeypatch.undo()


def saved(call: Callable[[], Tensor]) -> list[Tensor]:
    """What a forward keeps for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        call()
    return kept


def check_saved(call: Callable[..., Tensor]) -> None:
    args, W = made((64, 96), torch.float32)
    x = normal(3, 96, dtype=torch.float32).requires_grad_()
    kept = saved(lambda: call(x, *args, False))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in args[:3]}
    assert sum(t.nbytes for t in kept) < 0.17 * W.nbytes


def test_backward_keeps_the_codes_and_nothing_dense() -> None:
    check_saved(nf4_matmul)


def test_a_dense_weight_kept_for_backward_is_seen() -> None:
    with pytest.raises(AssertionError):
        check_saved(lambda x, *args: x @ nf4_dense(*args[:-1]).T)


def test_no_dense_weight_is_ever_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made while forward and backward run is a tile, or the result."""
    monkeypatch.setitem(packed.TILES, "cpu", 64 * 96)
    args, W = made((1024, 96), torch.float32)
    x = normal(4, 96, dtype=torch.float32).requires_grad_()
    sizes: list[int] = []
    rows = Packed.rows
    monkeypatch.setattr(Packed, "rows", lambda *a: (lambda t: (sizes.append(t.numel()), t)[1])(rows(*a)))
    nf4_matmul(x, *args, False).sum().backward()
    assert len(sizes) == 32
    assert max(sizes) <= 64 * 96 == W.numel() // 16


def test_gradients_of_any_order() -> None:
    args, _ = made((7, 13))
    x = normal(3, 13).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nf4_matmul(x, *args, False), x)
    assert torch.autograd.gradgradcheck(lambda x: nf4_matmul(x, *args, False).square(), x)


def test_it_is_a_proper_operation_of_torch() -> None:
    args, _ = made((33, 65))
    for transposed in (False, True):
        x = normal(2, 3, 33 if transposed else 65).requires_grad_()
        torch.library.opcheck(nf4_matmul, (x, *args, transposed))
    torch.library.opcheck(nf4_dense, args)


@pytest.mark.parametrize("tile", [2**19, 2**14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fine_print_of_memory_is_as_measured(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SCRATCH`, which memory estimates add, beside the allocator's own events."""
    monkeypatch.setitem(packed.TILES, "cpu", tile)
    args, W = made((512, 256), dtype)
    x, dy = normal(16, 256, dtype=dtype), normal(16, 512, dtype=dtype)
    for call, result, (before, beside) in (
        (lambda: nf4_matmul(x, *args, False), 16 * 512 * dtype.itemsize, matmul.matmul_scratch(x, *args, False)),
        (lambda: nf4_matmul(dy, *args, True), 16 * 256 * dtype.itemsize, matmul.matmul_scratch(dy, *args, True)),
        (lambda: nf4_dense(*args), W.nbytes, matmul.dense_scratch(*args)),
    ):
        want = max(before, result + beside)
        assert 0.9 * want <= (peak := _cpu_peak(call)) <= 1.1 * want, (peak, want)


def test_compiled_it_is_one_graph_that_keeps_the_codes_alone() -> None:
    args, W = made((64, 96), torch.float32)
    x = normal(3, 96, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(lambda x: nf4_matmul(x, *args, False), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), x @ W.T)
    assert sum(t.nbytes for t in saved(lambda: compiled(x))) < 0.17 * W.nbytes
    (dx,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(dx, torch.ones(3, 64) @ W)
