"""`reference.scaled` for a frozen pair: backward keeps r values a token, no copy of A or B in the compute dtype, and nothing d_out wide.

The expansion is computed a second time in backward, for b's gradient: it would cost d_out values a token to keep.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops import reference


@torch.library.custom_op("lorakit::scaled", mutates_args=())
def _scaled(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(y [.., d_out], A x [.., r]), computed in x's dtype (ids: in d's)."""
    dtype = x.dtype if x.is_floating_point() else d.dtype
    z = reference.project(x, A.to(dtype))
    return F.linear(z * d.to(dtype), B.to(dtype)) * b.to(dtype), z


@_scaled.register_fake
def _(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype, lead = (x.dtype, x.shape[:-1]) if x.is_floating_point() else (d.dtype, x.shape)
    return x.new_empty(*lead, len(b), dtype=dtype), x.new_empty(*lead, len(d), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[1:])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    z, A, d, B, b = ctx.saved_tensors
    every, dtype = tuple(range(dy.ndim - 1)), dy.dtype
    up = F.linear(z * d.to(dtype), B.to(dtype))  # [.., d_out], again
    db = (dy * up).sum(every, dtype=b.dtype)
    dzd = (dy * b.to(dtype)) @ B.to(dtype)  # [.., r]
    dd = (dzd * z).sum(every, dtype=d.dtype)
    dx = (dzd * d.to(dtype)) @ A.to(dtype) if ctx.needs_input_grad[0] else None
    return dx, None, dd, None, db


_scaled.register_autograd(_backward, setup_context=_keep)


def scaled(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """x (diag(b) B diag(d) A)ᵀ: [.., d_in] -> [.., d_out], ids [..] -> [.., d_out]; gradients for x, d and b alone."""
    y: Tensor = _scaled(x, A, d, B, b)[0]
    return y
