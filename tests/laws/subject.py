"""What the laws are checked on: a tiny model, a method at rank 4, and a point away from its start."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import Adapted, Method, attach, describe, get_method
from lorakit.core import random
from lorakit.data.tiny import tiny_model

SMALL: dict[str, Any] = {"r": 4, "target_r": 3}


def small(name: str, **more: Any) -> Method:
    """The method at rank 4. Of `more`, what it has no parameter for is left out."""
    known = describe(name).parameters
    return get_method(name, **{k: v for k, v in (SMALL | more).items() if k in known})


def has_dropout(name: str) -> bool:
    return "dropout" in describe(name).parameters


def base(arch: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """The same bits on every call."""
    return tiny_model(arch, **overrides).to(dtype)


def subject(
    name: str,
    arch: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    awake: bool = True,
    model: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Adapted:
    """A fresh tiny model with the method attached, away from its start when `awake`."""
    adapted = attach(base(arch, dtype, **(model or {})), small(name, **kwargs))
    return awaken(adapted) if awake else adapted


@torch.no_grad()
def awaken(adapted: Adapted, *, seed: int = 1, size: float = 0.1) -> Adapted:
    """Add noise to every trainable tensor, so that nothing is zero any more and no two are alike."""
    for p in adapted.params():
        noise = torch.empty(p.tensor.shape, dtype=torch.float64).normal_(0, size, generator=random.generator(seed, p.name))
        p.tensor.add_(noise.to(p.tensor.dtype))
    return adapted


def batch(seed: int = 0, *, rows: int = 2, length: int = 7) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids} if is_encoder_decoder(model) else {})).logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss; the mean logit's square for a model without one."""
    return model(input_ids=ids, labels=ids).loss


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def refusal(error: type[Exception], call: Callable[[], object]) -> str:
    """The message with which a call is refused."""
    try:
        call()
    except error as refused:
        return str(refused)
    raise AssertionError(f"no {error.__name__} was raised")


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by path."""
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit (NaN included)."""
    return (
        a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
    )


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest entry of b."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
