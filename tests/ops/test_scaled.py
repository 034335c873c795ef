"""The lean form of `scaled` is the reference's, in values and gradients, and keeps less."""

import pytest
import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.scaled import scaled


def tensors(dtype: torch.dtype = torch.float64, *, d_in: int = 7, d_out: int = 5, r: int = 3) -> tuple[Tensor, ...]:
    """x, A, d, B, b: A and B are corners of larger matrices, as a shared pair's are."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    return draw(2, 4, d_in), draw(r, d_in + 2)[:, :d_in], draw(r), draw(d_out + 3, r)[:d_out], draw(d_out)


def both(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> list[list[Tensor]]:
    """[y, gradients] of the reference and of the lean form."""
    out = []
    for op in (reference.scaled, scaled):
        wanted = [t.detach().clone().requires_grad_() for t in ([x] if x.is_floating_point() else []) + [d, b]]
        inputs = (wanted[0] if x.is_floating_point() else x, A, wanted[-2], B, wanted[-1])
        y = op(*inputs)
        out.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    return out


def test_values_and_gradients_are_the_references() -> None:
    x, *rest = tensors()
    for one, other in zip(*both(x, *rest), strict=True):
        assert (one - other).abs().max() < 1e-12
    ids = torch.tensor([[0, 6], [3, 3]])
    for one, other in zip(*both(ids, *rest), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-12


def test_gradients_by_finite_differences_and_in_half_precision() -> None:
    x, A, d, B, b = tensors()
    assert torch.autograd.gradcheck(lambda x, d, b: scaled(x, A, d, B, b), (x.requires_grad_(), d.requires_grad_(), b.requires_grad_()))
    x, A, d, B, b = tensors(torch.float32)
    d.requires_grad_(), b.requires_grad_()
    half = x.bfloat16().requires_grad_()
    y = scaled(half, A, d, B, b)
    grads = torch.autograd.grad(y.float().square().sum(), [half, d, b])
    assert [y.dtype, *(g.dtype for g in grads)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    exact = torch.autograd.grad(scaled(x.requires_grad_(), A, d, B, b).square().sum(), [x, d, b])
    assert all((g - e).abs().max() < 0.1 * e.abs().max() for g, e in zip(grads, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_r_wide_is_kept(dtype: torch.dtype) -> None:
    """Neither the output before b, nor copies of A and B in the compute dtype."""
    x, A, d, B, b = tensors(torch.float32, d_in=40, d_out=50)
    d.requires_grad_(), b.requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    for op, most in ((scaled, 8 * 3), (reference.scaled, None)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            op(x.to(dtype), *(t.to(dtype) if op is reference.scaled else t for t in (A, d, B, b)))
        own = {t.untyped_storage().data_ptr() for t in (A, d, B, b)}
        beside = [t.numel() for pointer, t in kept.items() if pointer not in own]
        assert sum(beside) <= most if most else sum(beside) > 8 * 50
