"""`reference.grouped` as one operation of torch's: it compiles without a graph break, and a frozen W keeps no input for backward.

Rows of bf16 on a GPU go to torch's grouped kernel where its alignment (16 bytes) allows it; elsewhere one product an expert is written into
one output.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("lorakit::grouped", mutates_args=())
def grouped(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """x_i W_{e(i)}ᵀ: [n, d_in], [E, d_out, d_in], ends [E] int32 -> [n, d_out]."""
    if _has_kernel(x, W):
        return F.grouped_mm(x, W.mT, offs=ends)
    out = x.new_empty(len(x), W.shape[1])
    for e, rows in _groups(ends):
        torch.mm(x[rows], W[e].T, out=out[rows])
    return out


@torch.library.custom_op("lorakit::grouped_outer", mutates_args=())
def grouped_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Σ_i dy_i x_iᵀ over each expert's rows: [n, d_out], [n, d_in], ends [E] -> [E, d_out, d_in]."""
    out = x.new_zeros(len(ends), dy.shape[1], x.shape[1])
    for e, rows in _groups(ends):
        torch.mm(dy[rows].T, x[rows], out=out[e])
    return out


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


def _has_kernel(x: Tensor, W: Tensor) -> bool:
    aligned = x.shape[1] % 8 == 0 and W.shape[1] % 8 == 0 and x.is_contiguous() and (W.is_contiguous() or W.mT.is_contiguous())
    return x.is_cuda and x.dtype == W.dtype == torch.bfloat16 and aligned


@grouped.register_fake
def _(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[1])


@grouped_outer.register_fake
def _(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    first, second, ends = inputs
    needs_first, needs_second, *_ = ctx.needs_input_grad
    ctx.save_for_backward(first if needs_second else None, second if needs_first else None, ends)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, W, ends = ctx.saved_tensors
    dy = dy.contiguous()
    return None if W is None else grouped(dy, W.mT, ends), None if x is None else grouped_outer(dy, x, ends), None


def _backward_outer(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    dy, x, ends = ctx.saved_tensors
    return None if x is None else grouped(x, G, ends), None if dy is None else grouped(dy, G.mT, ends), None


def each(x: Tensor, W: Tensor, ends: Tensor | None) -> Tensor:
    """x W_eᵀ for rows sorted by expert, [n, d_in] with their ends, or, without ends, for rows of each expert, [E, n, d_in]."""
    return x @ W.mT if ends is None else grouped(x, W, ends)


grouped.register_autograd(_backward, setup_context=_save)
grouped_outer.register_autograd(_backward_outer, setup_context=_save)
