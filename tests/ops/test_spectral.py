"""The spectral operations against torch's own derivatives (fp64)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.ops import spectral

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))


def draw(sizes: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c [n], its places, x [2, 3, d_in], and a weight of the output [2, 3, d_out]."""
    d_out, d_in, n, seed = sizes
    gen = torch.Generator().manual_seed(seed)
    at = torch.randperm(d_out * d_in, generator=gen)[:n]
    c, x, g = (torch.randn(shape, generator=gen, dtype=torch.float64) for shape in (at.shape, (2, 3, d_in), (2, 3, d_out)))
    return c.requires_grad_(), at, x.requires_grad_(), g


def plain(c: Tensor, at: Tensor, d_out: int, d_in: int) -> Tensor:
    """The wave in torch's own operations."""
    return torch.fft.ifft2(torch.zeros(d_out * d_in, dtype=c.dtype).index_copy(0, at, c).view(d_out, d_in)).real


@given(SIZES)
def test_the_wave_and_its_gradient(sizes: tuple[int, int, int, int]) -> None:
    c, at, _, _ = draw(sizes)
    found, want = spectral.wave(c, at, *sizes[:2]), plain(c, at, *sizes[:2])
    torch.testing.assert_close(found, want)
    G = torch.randn(sizes[:2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(W, c, G)[0] for W in (found, want)))
    torch.testing.assert_close((found.detach() * G).sum(), (c.detach() * spectral.read(G, at)).sum())  # adjoint


@given(SIZES, st.floats(-4, 4))
def test_project_and_its_gradients(sizes: tuple[int, int, int, int], s: float) -> None:
    c, at, x, g = draw(sizes)
    ids = torch.randint(sizes[1], (2, 3), generator=torch.Generator().manual_seed(2))
    W = s * plain(c, at, *sizes[:2])
    for inputs, found, want in (
        ([x, c], spectral.project(x, c, at, *sizes[:2], s), x @ W.T),
        ([c], spectral.project(ids, c, at, *sizes[:2], s), W.T[ids]),
    ):
        torch.testing.assert_close(found, want)
        for a, b in zip(*(torch.autograd.grad(y, inputs, g, retain_graph=True) for y in (found, want)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ids", [False, True])
def test_under_autocast_the_gradients_are_the_plain_ones(ids: bool) -> None:
    """The product's output, and so what comes back, is bf16 there beside an input in fp32."""
    gen = torch.Generator().manual_seed(0)
    at, c = torch.randperm(6 * 5, generator=gen)[:7], torch.randn(7, generator=gen).requires_grad_()
    x = torch.randint(5, (2, 3), generator=gen) if ids else torch.randn(2, 3, 5, generator=gen).requires_grad_()
    inputs = [c] if ids else [c, x]
    y = spectral.project(x, c, at, 6, 5, 2.0)
    weight = torch.randn(y.shape, generator=gen)
    want = torch.autograd.grad((y * weight).sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        z = spectral.project(x, c, at, 6, 5, 2.0)
    found = torch.autograd.grad((z.float() * weight).sum(), inputs)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
