"""x Wᵀ and x W of a packed W, decoded a tile of rows at a time: no dense W is ever whole, and backward keeps the codes alone.

They are one operation with two orientations, each the other's gradient. An operation of its own is opaque to a compiler, which could
otherwise join the decoding of forward and backward and keep the dense W between them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorakit.parts.bases.packed import Layout, Packed


@torch.library.custom_op("lorakit::nf4_matmul", mutates_args=())
def nf4_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    d_out: int,
    d_in: int,
    dtype: torch.dtype,
    blocksize: int,
    transposed: bool,
) -> Tensor:
    """[.., d_in] -> x Wᵀ [.., d_out]; `transposed`: [.., d_out] -> x W [.., d_in]."""
    packed, layout = Packed(codes, scales, nested), Layout(d_out, d_in, dtype, blocksize, nested is not None)
    flat = x.reshape(-1, x.shape[-1])
    out = (_x_W if transposed else _x_Wt)(flat, packed, layout)
    return out.view(*x.shape[:-1], out.shape[-1])


def _x_Wt(x: Tensor, packed: Packed, layout: Layout) -> Tensor:
    tiles = layout.tiles(x.device)
    if len(tiles) == 1:
        return x @ packed.rows(layout, *tiles[0]).to(x.dtype).T
    out = x.new_empty(len(x), layout.d_out)
    for a, b in tiles:
        out[:, a:b] = x @ packed.rows(layout, a, b).to(x.dtype).T
    return out


def _x_W(x: Tensor, packed: Packed, layout: Layout) -> Tensor:
    tiles = layout.tiles(x.device)
    if len(tiles) == 1:
        return x @ packed.rows(layout, *tiles[0]).to(x.dtype)
    total = x.new_zeros(len(x), layout.d_in, dtype=torch.promote_types(x.dtype, torch.float32))
    for a, b in tiles:
        total += x[:, a:b] @ packed.rows(layout, a, b).to(x.dtype)
    return total.to(x.dtype)


@nf4_matmul.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, nested: Tensor | None, d_out: int, d_in: int, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], d_in if rest[-1] else d_out)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, nested, *ctx.rest, ctx.transposed = inputs
    ctx.save_for_backward(codes, scales, nested)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = nf4_matmul(dy, *ctx.saved_tensors, *ctx.rest, not ctx.transposed) if ctx.needs_input_grad[0] else None
    return dx, *[None] * 8


nf4_matmul.register_autograd(_gradient, setup_context=_remember)


@torch.library.custom_op("lorakit::nf4_dense", mutates_args=())
def nf4_dense(codes: Tensor, scales: Tensor, nested: Tensor | None, d_out: int, d_in: int, dtype: torch.dtype, blocksize: int) -> Tensor:
    """W whole: [d_out, d_in]."""
    packed, layout = Packed(codes, scales, nested), Layout(d_out, d_in, dtype, blocksize, nested is not None)
    return packed.rows(layout, 0, d_out)


@nf4_dense.register_fake
def _(codes: Tensor, scales: Tensor, nested: Tensor | None, d_out: int, d_in: int, dtype: torch.dtype, blocksize: int) -> Tensor:
    return codes.new_empty(d_out, d_in, dtype=dtype)


def matmul_scratch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    d_out: int,
    d_in: int,
    dtype: torch.dtype,
    blocksize: int,
    transposed: bool,
) -> tuple[int, int]:
    """Bytes that `nf4_matmul` holds for a moment besides its arguments: before there is a result, and beside the result."""
    tiles = Layout(d_out, d_in, dtype, blocksize, nested is not None).tiles(x.device)
    rows, tokens, size = max(b - a for a, b in tiles), math.prod(x.shape[:-1]), x.element_size()
    tile = rows * d_in * (dtype.itemsize + (0 if x.dtype == dtype else size))
    if len(tiles) == 1:
        return max(_decoding(rows * d_in, dtype), tile), tile
    part = tokens * (d_in if transposed else rows) * size
    total = tokens * d_in * 4 if transposed and size < 4 else 0
    return 0, total + max(_decoding(rows * d_in, dtype), tile + part)


def dense_scratch(
    codes: Tensor, scales: Tensor, nested: Tensor | None, d_out: int, d_in: int, dtype: torch.dtype, blocksize: int
) -> tuple[int, int]:
    """The same of `nf4_dense`."""
    return _decoding(d_out * d_in, dtype), 0


def _decoding(n: int, dtype: torch.dtype) -> int:
    """n entries as fp32, and either the int32 index of every second one or their copy in another dtype."""
    return n * (4 + max(2, 0 if dtype == torch.float32 else dtype.itemsize))


SCRATCH: dict[Any, Callable[..., tuple[int, int]]] = {
    torch.ops.lorakit.nf4_matmul.default: matmul_scratch,
    torch.ops.lorakit.nf4_dense.default: dense_scratch,
}
"""What a memory estimate cannot see, since it does not run the operations."""
