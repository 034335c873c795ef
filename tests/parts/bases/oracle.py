"""bitsandbytes as the oracle of bits. Its CPU kernels are trusted for what is asked of them here and nothing else:

quantize_4bit is right everywhere. dequantize_4bit is silently wrong on AVX-512 where d_in is a multiple of 16 and not of the block size,
so it is only asked for whole blocks (`decodes`). A Linear4bit that ran in eval mode repacks itself and loses its gradients: it is kept in
train mode.
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor


def bitsandbytes() -> ModuleType:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of NF4's bits, is not installed (extra: test)")


def decodes(shape: tuple[int, ...], blocksize: int) -> bool:
    """Whether its dequantize_4bit may be asked."""
    return shape[-1] % blocksize == 0


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 0.02) -> Tensor:
    """A Gaussian weight with some outliers."""
    rng = torch.Generator().manual_seed(seed)
    W = std * torch.randn(shape, generator=rng, dtype=torch.float64)
    W.view(-1)[:: max(1, W.numel() // 7)] *= 5
    return W.to(dtype)
