"""γ ∘ (x Wᵀ + u Bᵀ) + bias in one product with two loops, first over d_in, then over r: y is written once and never read.

It pays where this kernel's rate with W comes close enough to cuBLAS' that the saved pass over y decides (benchmarks/gpu_kernels.py says).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.triton.products import _dense
from lorakit.ops.triton.tuning import bucket, rank_tile, tuned

_K = 64
"""Of d_in that is added at a time."""


def linear(x: Tensor, W: Tensor, u: Tensor, B: Tensor, *, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """γ ∘ (x Wᵀ + u Bᵀ) + bias: [n, m]. x [n, k], W [m, k], u [n, r], B [m, r], gain γ and bias [m]; any strides, so that with W.T and A.T
    it is backward's dy W + dz A."""
    (n, k), m, r = x.shape, len(W), u.shape[1]
    y = x.new_empty(n, m)
    if n and m:
        with torch.cuda.device_of(x):
            _linear[lambda c: (triton.cdiv(n, c["BLOCK_N"]) * triton.cdiv(m, c["BLOCK_M"]),)](
                x, W, u, B, y, _dense(gain, y), _dense(bias, y), n, m, k, r, *x.stride(), *W.stride(), *u.stride(), *B.stride(), bucket(n),
                BLOCK_K=_K, BLOCK_R=min(64, rank_tile(r)), GAIN=gain is not None, BIAS=bias is not None
            )  # fmt: skip
    return y


@tuned(
    ({"BLOCK_N": 16, "BLOCK_M": 64, "GROUP": 1}, 4, 5),
    ({"BLOCK_N": 64, "BLOCK_M": 64, "GROUP": 8}, 4, 4),
    ({"BLOCK_N": 64, "BLOCK_M": 128, "GROUP": 8}, 4, 4),
    ({"BLOCK_N": 128, "BLOCK_M": 128, "GROUP": 8}, 4, 4),
    ({"BLOCK_N": 128, "BLOCK_M": 128, "GROUP": 8}, 8, 3),
    ({"BLOCK_N": 128, "BLOCK_M": 256, "GROUP": 8}, 8, 3),
    ({"BLOCK_N": 128, "BLOCK_M": 256, "GROUP": 8}, 8, 4),
    ({"BLOCK_N": 256, "BLOCK_M": 128, "GROUP": 8}, 8, 3),
    small={"BLOCK_N": 16, "BLOCK_M": 32, "GROUP": 2},
    key=["m", "k", "r", "bucket", "W_row", "GAIN", "BIAS"],
)
def _linear(  # type: ignore[no-untyped-def]
    x, W, u, B, y, gain, bias, n, m, k, r, x_row, x_col, W_row, W_col, u_row, u_col, B_row, B_col, bucket,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GAIN: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """One tile of y; GROUP rows of tiles run column by column, so that what is read of W stays in the cache."""
    down, across = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    number = tl.program_id(0)
    group = number // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    rows = (group * GROUP + number % (GROUP * across) % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (number % (GROUP * across) // height) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    W_rows = W + cols.to(tl.int64)[None, :] * W_row
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, k, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        xs = tl.load(x_rows + at[None, :] * x_col, mask=(rows < n)[:, None] & (at < k)[None, :], other=0.0)
        Ws = tl.load(W_rows + at.to(tl.int64)[:, None] * W_col, mask=(cols < m)[None, :] & (at < k)[:, None], other=0.0)
        acc = tl.dot(xs, Ws, acc, input_precision="ieee")
    for first in range(0, r, BLOCK_R):
        at = first + tl.arange(0, BLOCK_R)
        us = tl.load(u + rows.to(tl.int64)[:, None] * u_row + at[None, :] * u_col, mask=(rows < n)[:, None] & (at < r)[None, :], other=0.0)
        Bs = tl.load(B + cols[None, :] * B_row + at[:, None] * B_col, mask=(cols < m)[None, :] & (at < r)[:, None], other=0.0)
        acc = tl.dot(us, Bs.to(us.dtype), acc, input_precision="ieee")
    if GAIN:
        acc *= tl.load(gain + cols, mask=cols < m, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < m, other=0.0).to(tl.float32)[None, :]
    to = y + rows.to(tl.int64)[:, None] * m + cols[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=(rows < n)[:, None] & (cols < m)[None, :])
