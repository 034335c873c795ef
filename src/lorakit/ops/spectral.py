"""A product with a matrix given by a few entries of its Fourier spectrum: ΔW = s · Re ifft2(F), F zero but for c at the places `at`.

They are custom operations because inductor has no code for complex numbers. `wave` and `read` are each other's adjoint.
"""

from typing import Any

import torch
from torch import Tensor

from lorakit.ops import reference as ops


@torch.library.custom_op("lorakit::spectral_wave", mutates_args=())
def wave(c: Tensor, at: Tensor, d_out: int, d_in: int) -> Tensor:
    """Re ifft2 of the matrix that is c at the places `at` and zero elsewhere: d_out × d_in."""
    F = c.new_zeros(d_out * d_in).index_copy(0, at, c).view(d_out, d_in)
    W: Tensor = torch.fft.ifft2(F).real.contiguous()
    return W


@torch.library.custom_op("lorakit::spectral_read", mutates_args=())
def read(G: Tensor, at: Tensor) -> Tensor:
    """Re fft2(G) at the places `at`, over the size of G: the gradient by c where G is that by the wave."""
    g: Tensor = torch.fft.fft2(G).real.flatten()[at] / G.numel()
    return g


@wave.register_fake
def _(c: Tensor, at: Tensor, d_out: int, d_in: int) -> Tensor:
    return c.new_empty(d_out, d_in)


@read.register_fake
def _(G: Tensor, at: Tensor) -> Tensor:
    return G.new_empty(at.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape = inputs[0].shape


wave.register_autograd(lambda ctx, G: (read(G, *ctx.saved_tensors), None, None, None), setup_context=_keep)
read.register_autograd(lambda ctx, g: (wave(g, *ctx.saved_tensors, *ctx.shape), None), setup_context=_keep)


@torch.library.custom_op("lorakit::spectral_project", mutates_args=())
def project(x: Tensor, c: Tensor, at: Tensor, d_out: int, d_in: int, s: float) -> Tensor:
    """x ΔWᵀ. Backward forms ΔW again from c: kept, the dense matrices of all sites would cost as much as the model."""
    dtype = x.dtype if x.is_floating_point() else c.dtype
    return ops.project(x, (wave(c, at, d_out, d_in) * s).to(dtype))


@project.register_fake
def _(x: Tensor, c: Tensor, at: Tensor, d_out: int, d_in: int, s: float) -> Tensor:
    lead = x.shape[:-1] if x.is_floating_point() else x.shape
    return x.new_empty(*lead, d_out, dtype=x.dtype if x.is_floating_point() else c.dtype)


def _keep_for_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, d_out, d_in, ctx.s = inputs
    ctx.save_for_backward(*tensors)
    ctx.shape = (d_out, d_in)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, c, at = ctx.saved_tensors
    dx = dy @ (wave(c, at, *ctx.shape) * ctx.s).to(dy.dtype) if ctx.needs_input_grad[0] else None
    rows = dy.reshape(-1, dy.shape[-1])  # [tokens, d_out]
    if x.is_floating_point():
        G = rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype)  # under autocast they differ
    else:
        G = rows.new_zeros(ctx.shape[::-1]).index_add(0, x.flatten(), rows).T
    return dx, read(G.to(c.dtype), at) * ctx.s, None, None, None, None


project.register_autograd(_backward, setup_context=_keep_for_project)
