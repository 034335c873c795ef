"""The seam of the hot path as Triton kernels, for CUDA; ops/cpu.py has the same signatures.

products.py   down, finish_, gained, outer: the r-wide products, each one pass over what is wide
linear.py     W x and the low-rank change in one product
nf4.py        rows of an NF4 weight
keep.py       the dropout mask, made in registers
tuning.py     which tile sizes are tried

Only `available` may be imported where Triton is not installed; the rest is imported after it said yes. Every kernel accumulates in fp32, in
an order that its tuning does not change, and none adds atomically: the same input gives the same bits.
"""

import importlib.util
import os

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INSTALLED = importlib.util.find_spec("triton") is not None


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute there in that dtype: on CUDA, where Triton is installed (CUDA builds of torch bring it), and asked for by
    LORAKIT_TRITON=1 as long as there is no figure of them from a GPU."""
    return device.type == "cuda" and INSTALLED and dtype in DTYPES and os.environ.get("LORAKIT_TRITON") == "1"
