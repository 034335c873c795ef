"""Rows of an NF4 weight from its codes in one pass: 4 bits read and one entry written for each, no index and no fp32 copy in between.

    ŵ_i = L[code_i] · c_b        c_b = M[code_b] · n_j + o        b = i // blocksize,  j = b // 256        (parts/bases/nf4.py, scales.py)

The products and the sum are rounded one by one, as torch does: the bits are those of the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.ops.triton.tuning import tuned


def decode(
    codes: Tensor, scales: Tensor, nested: Tensor | None, levels: Tensor, table: Tensor, *, start: int, n: int, blocksize: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Entries start to start + n of the flat weight, [n]; `start` begins a block.

    codes uint8 [⌈N / 2⌉], two to a byte, the first in the high half. scales fp32 [blocks], or uint8 with `nested`, fp32
    [⌈blocks / 256⌉ + 1], whose last entry is the offset. levels fp32 [16]; table fp32 [256], what a byte of `scales` stands for.
    """
    out = codes.new_empty(n, dtype=dtype)
    blocks = triton.cdiv(n, blocksize)
    if n:
        with torch.cuda.device_of(codes):
            _decode[lambda c: (triton.cdiv(blocks * blocksize, c["ENTRIES"]),)](
                codes, scales, scales if nested is None else nested, levels, table, out, start // blocksize, n, (n + 1) // 2,
                0 if nested is None else len(nested) - 1, HALF=blocksize // 2, NESTED=nested is not None, enable_fp_fusion=False
            )  # fmt: skip
    return out


@tuned(
    ({"ENTRIES": 4096}, 4, 1),
    ({"ENTRIES": 4096}, 8, 1),
    ({"ENTRIES": 8192}, 4, 1),
    ({"ENTRIES": 8192}, 8, 1),
    small={"ENTRIES": 4096},
    key=["HALF", "NESTED"],
)
def _decode(  # type: ignore[no-untyped-def]
    codes, scales, nested, levels, table, out, first, size, bytes, last, ENTRIES: tl.constexpr, HALF: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """ENTRIES of them: whole blocks of 2 · HALF, from block `first`; `size` entries in `bytes` are wanted, the offset lies at `last`."""
    BLOCKS: tl.constexpr = ENTRIES // (2 * HALF)
    here = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # of the blocks that are wanted
    block = first + here
    scale = tl.load(scales + block, mask=here * 2 * HALF < size, other=0)
    if NESTED:
        nearest = tl.load(nested + block // 256, mask=here * 2 * HALF < size, other=0.0)
        scale = tl.load(table + scale.to(tl.int32)) * nearest + tl.load(nested + last)
    byte = here[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pairs = tl.load(codes + (block * HALF)[:, None] + tl.arange(0, HALF)[None, :], mask=byte < bytes, other=0)
    pairs = tl.reshape(tl.join(pairs >> 4, pairs & 15), (BLOCKS, 2 * HALF))
    entry = here[:, None] * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
    value = tl.load(levels + pairs.to(tl.int32)) * scale[:, None]
    tl.store(out + entry, value.to(out.dtype.element_ty), mask=entry < size)
