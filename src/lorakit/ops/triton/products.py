"""The r-wide products of a fused adapted layer as Triton kernels: `ops.cpu`'s functions of the same names, each one pass over x or y.

x [n, k], y [n, m], A [r, k] and B [m, r] have any strides. A and B may be of another float dtype than x: they are rounded to x's, B to u's,
where they are used, so nobody need make a copy. They move n · k (x) or 2 n · m (y) entries and do 2 r flops with each: memory bounds them.
Where there are too few tiles to fill the GPU, the sum is cut into parts that torch adds up.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.mask import Mask
from lorakit.ops.triton.keep import keep, limits, numbers
from lorakit.ops.triton.tuning import bucket, rank_tile, splits, tuned

_K = 128
"""Of k that `down` adds at a time."""
_N = 64
"""Tokens that `outer` adds at a time."""


def down(x: Tensor, A: Tensor, mask: Mask | None = None) -> Tensor:
    """(keep ∘ x) Aᵀ: [n, r] in x's dtype."""
    (n, k), r = x.shape, len(A)
    tile = rank_tile(r)
    parts = splits(triton.cdiv(n, 64) * triton.cdiv(r, tile), k // (4 * _K), x.device)
    z = _partial(x, parts, n, r)
    flags = {"BLOCK_R": tile, "BLOCK_K": _K, "PARTS": parts, "MASKED": mask is not None, "WHOLE_WORDS": k % 8 == 0}
    if n and r:
        with torch.cuda.device_of(x):
            _down[lambda c: (triton.cdiv(n, c["BLOCK_N"]), triton.cdiv(r, tile), parts)](
                x, A, z, n, k, r, *x.stride(), *A.stride(), *numbers(mask), bucket(n), **flags
            )  # fmt: skip
    return _total(z, x.dtype)


def finish_(y: Tensor, u: Tensor, B: Tensor, *, gain: Tensor | None = None, bias: Tensor | None = None, mask: Mask | None = None) -> Tensor:
    """y ← y + keep ∘ (u Bᵀ), and with a gain γ [m] y ← bias + γ ∘ (y − bias), in place, read and written once: [n, m]. u [n, r],
    bias [m] as it is in y."""
    return _finished(y, y, u, B, gain, bias, mask)


def gained(y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """bias + γ ∘ (y − bias), anew: [n, m]."""
    return _finished(y, y.new_empty(y.shape), y[:, :0], y[:, :0], gain, bias, None)


def _finished(y: Tensor, out: Tensor, u: Tensor, B: Tensor, gain: Tensor | None, bias: Tensor | None, mask: Mask | None) -> Tensor:
    """y + keep ∘ (u Bᵀ), with a gain bias + γ ∘ (that − bias), written to `out`, which may be y."""
    (n, m), r = y.shape, u.shape[1]
    flags: dict[str, Any] = {"GAIN": gain is not None, "BIAS": gain is not None and bias is not None}
    flags |= {"MASKED": mask is not None, "WHOLE_WORDS": m % 8 == 0}
    if n and m:
        with torch.cuda.device_of(y):
            _finish[lambda c: (triton.cdiv(m, c["BLOCK_M"]), triton.cdiv(n, c["BLOCK_N"]))](
                y, out, u, B, _dense(gain, y), _dense(bias, y), n, m, r, *y.stride(), *out.stride(), *u.stride(), *B.stride(),
                *numbers(mask), bucket(n), BLOCK_R=rank_tile(r), **flags
            )  # fmt: skip
    return out


def outer(dz: Tensor, x: Tensor, mask: Mask | None = None) -> Tensor:
    """dzᵀ (keep ∘ x): [r, k] in x's dtype. dz [n, r]."""
    (n, k), r = x.shape, dz.shape[1]
    tile = rank_tile(r)
    parts = splits(triton.cdiv(k, 128) * triton.cdiv(r, tile), n // (4 * _N), x.device)
    dA = _partial(x, parts, r, k)
    flags = {"BLOCK_R": tile, "BLOCK_N": _N, "PARTS": parts, "MASKED": mask is not None, "WHOLE_WORDS": k % 8 == 0}
    if r and k:
        with torch.cuda.device_of(x):
            _outer[lambda c: (triton.cdiv(k, c["BLOCK_K"]), triton.cdiv(r, tile), parts)](
                dz, x, dA, n, k, r, *dz.stride(), *x.stride(), *numbers(mask), bucket(n), **flags
            )  # fmt: skip
    return _total(dA, x.dtype)


def _partial(x: Tensor, parts: int, *shape: int) -> Tensor:
    """Room for the parts of a sum, in fp32; for one part alone in the dtype of the result."""
    return x.new_empty(parts, *shape, dtype=torch.float32 if parts > 1 else x.dtype)


def _total(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts.sum(0).to(dtype) if len(parts) > 1 else parts[0]


def _dense(row: Tensor | None, y: Tensor) -> Tensor:
    """A row without gaps; for None anything, which is not read."""
    return y if row is None else row.contiguous()


@tuned(
    ({"BLOCK_N": 32}, 4, 4),
    ({"BLOCK_N": 64}, 4, 3),
    ({"BLOCK_N": 64}, 4, 5),
    ({"BLOCK_N": 64}, 8, 4),
    ({"BLOCK_N": 128}, 8, 3),
    small={"BLOCK_N": 16},
    key=["k", "r", "bucket", "MASKED"],
)
def _down(  # type: ignore[no-untyped-def]
    x, A, z, n, k, r, x_row, x_col, A_row, A_col, key, whole, part, bucket,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
):  # fmt: skip
    """One part of z [PARTS, n, r] for BLOCK_N tokens; a part is so many tiles of k."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(k, PARTS), BLOCK_K) * BLOCK_K
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    A_rows = A + ranks[None, :] * A_row
    if MASKED:
        limit = limits(rows, key, whole, part)
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for first in range(here * span, tl.minimum(k, (here + 1) * span), BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        xs = tl.load(x_rows + cols[None, :] * x_col, mask=(rows < n)[:, None] & (cols < k)[None, :], other=0.0)
        As = tl.load(A_rows + cols[:, None] * A_col, mask=(ranks < r)[None, :] & (cols < k)[:, None], other=0.0)
        if MASKED:
            xs = tl.where(keep(rows, first, limit, key, k, BLOCK_K, WHOLE_WORDS), xs, 0.0)
        acc = tl.dot(xs, As.to(xs.dtype), acc, input_precision="ieee")
    to = z + (here.to(tl.int64) * n + rows)[:, None] * r + ranks[None, :]
    tl.store(to, acc.to(z.dtype.element_ty), mask=(rows < n)[:, None] & (ranks < r)[None, :])


@tuned(
    ({"BLOCK_N": 32, "BLOCK_M": 128}, 4, 2),
    ({"BLOCK_N": 32, "BLOCK_M": 256}, 4, 2),
    ({"BLOCK_N": 64, "BLOCK_M": 64}, 4, 2),
    ({"BLOCK_N": 64, "BLOCK_M": 128}, 4, 2),
    ({"BLOCK_N": 64, "BLOCK_M": 256}, 8, 2),
    ({"BLOCK_N": 128, "BLOCK_M": 128}, 8, 2),
    small={"BLOCK_N": 16, "BLOCK_M": 64},
    key=["m", "r", "bucket", "MASKED", "GAIN", "BIAS"],
    restored=("out",),
)
def _finish(  # type: ignore[no-untyped-def]
    y, out, u, B, gain, bias, n, m, r, y_row, y_col, out_row, out_col, u_row, u_col, B_row, B_col, key, whole, part, bucket,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, GAIN: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
):  # fmt: skip
    """One tile of `out`, which may be y."""
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * BLOCK_M  # neighbors in time are neighbors in memory
    cols = first + tl.arange(0, BLOCK_M)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    ys = tl.load(y + rows.to(tl.int64)[:, None] * y_row + cols[None, :] * y_col, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for rank in range(0, r, BLOCK_R):
        ranks = rank + tl.arange(0, BLOCK_R)
        us = tl.load(
            u + rows.to(tl.int64)[:, None] * u_row + ranks[None, :] * u_col, mask=(rows < n)[:, None] & (ranks < r)[None, :], other=0.0
        )
        Bs = tl.load(B + ranks[:, None] * B_col + cols[None, :] * B_row, mask=(ranks < r)[:, None] & (cols < m)[None, :], other=0.0)
        acc = tl.dot(us, Bs.to(us.dtype), acc, input_precision="ieee")
    if MASKED:
        acc = tl.where(keep(rows, first, limits(rows, key, whole, part), key, m, BLOCK_M, WHOLE_WORDS), acc, 0.0)
    acc += ys.to(tl.float32)
    if BIAS:
        shift = tl.load(bias + cols, mask=cols < m, other=0.0).to(ys.dtype).to(tl.float32)[None, :]
        acc -= shift
    if GAIN:
        acc *= tl.load(gain + cols, mask=cols < m, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += shift
    tl.store(out + rows.to(tl.int64)[:, None] * out_row + cols[None, :] * out_col, acc.to(ys.dtype), mask=inside)


@tuned(
    ({"BLOCK_K": 64}, 4, 3),
    ({"BLOCK_K": 64}, 4, 5),
    ({"BLOCK_K": 128}, 4, 3),
    ({"BLOCK_K": 128}, 4, 5),
    ({"BLOCK_K": 128}, 8, 4),
    ({"BLOCK_K": 256}, 8, 3),
    small={"BLOCK_K": 64},
    key=["k", "r", "bucket", "MASKED"],
)
def _outer(  # type: ignore[no-untyped-def]
    dz, x, dA, n, k, r, dz_row, dz_col, x_row, x_col, key, whole, part, bucket,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
):  # fmt: skip
    """One part of dA [PARTS, r, k] for BLOCK_K columns; a part is so many tiles of tokens."""
    first = tl.program_id(0) * BLOCK_K
    cols = first + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(n, PARTS), BLOCK_N) * BLOCK_N
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for token in range(here * span, tl.minimum(n, (here + 1) * span), BLOCK_N):
        rows = token + tl.arange(0, BLOCK_N)
        at = rows.to(tl.int64)
        dzs = tl.load(dz + at[None, :] * dz_row + ranks[:, None] * dz_col, mask=(ranks < r)[:, None] & (rows < n)[None, :], other=0.0)
        xs = tl.load(x + at[:, None] * x_row + cols[None, :] * x_col, mask=(rows < n)[:, None] & (cols < k)[None, :], other=0.0)
        if MASKED:
            xs = tl.where(keep(rows, first, limits(rows, key, whole, part), key, k, BLOCK_K, WHOLE_WORDS), xs, 0.0)
        acc = tl.dot(dzs.to(xs.dtype), xs, acc, input_precision="ieee")
    to = dA + (here.to(tl.int64) * r + ranks)[:, None] * k + cols[None, :]
    tl.store(to, acc.to(dA.dtype.element_ty), mask=(ranks < r)[:, None] & (cols < k)[None, :])
