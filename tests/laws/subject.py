"""What the laws are checked on: a tiny model, a method at rank 4, and a point away from its start."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, Method, NotMergeable, attach, describe, get_method
from lorakit.core import random
from lorakit.core.base import expand
from lorakit.core.calibrate import Calibration
from lorakit.core.layer import Slot
from lorakit.data.tiny import tiny_model
from lorakit.parts.bases.quantize import quantize

SMALL: dict[str, Any] = {
    "r": 4,
    "period": 2,
    "warmup": 1,
    "target_r": 3,
    "p_target": 0.3,
    "sensitivity": False,
    "tokens": 3,
    "n_frequency": 6,
    "vector_length": 8,
    "num_vectors": 12,
    "factor_in": 16,
    "keep": "mean",
    "rho": 1.0,
    "experts": 3,
}  # rho 1: EVA's ranks follow from no data


def not_fused(m: pytest.MonkeyPatch) -> None:
    """Layers as a compiler sees them, without the fused function."""
    m.setattr(Slot, "fused", lambda self, x: None)


def small(name: str, **more: Any) -> Method:
    """The method at rank 4. Of `more`, what it has no parameter for is left out; nothing to unfreeze means the method's own default."""
    known = describe(name).parameters
    return get_method(name, **{k: v for k, v in (SMALL | more).items() if k in known and (k, v) != ("unfreeze", ())})


def provides(method: Method) -> frozenset[str]:
    """What its deltas provide; nothing for a method that has none."""
    return frozenset() if method.delta is None else method.delta.provides


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
    adapted = attached(base(arch, dtype, **(model or {})), small(name, **kwargs))
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


def attached(model: nn.Module, method: Method, **kwargs: Any) -> Adapted:
    """`attach` with batches for the methods that start from data."""
    return attach(model, method, calibration=calibration(4), **kwargs)


def stored(model: nn.Module, method: Method) -> nn.Module:
    """The model that a method changes: where it says how the base is stored, in that storage."""
    return model if method.base is None else quantize(model, method.base)


def dense(model: nn.Module, method: Method) -> nn.Module:
    """The same with plain weights: what the stored ones stand for."""
    return expand(stored(model, method))


def calibration(batches: int) -> Calibration:
    """Batches of the same ids as training sees, with labels."""
    return Calibration([{"input_ids": batch(i), "labels": batch(i)} for i in range(batches)])


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids} if is_encoder_decoder(model) else {})).logits


def said(adapted: Adapted, layer: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What the patches of a forward of the model say to a layer beside its input, for laws that run the layer alone."""
    found: dict[str, Tensor] = {}
    if any(adapted.methods[name].patches for name in adapted.active):
        handle = layer.register_forward_pre_hook(lambda *_: found.update(adapted.context.memo))
        logits(adapted.model, ids)
        handle.remove()
    return {k: v.detach().requires_grad_() for k, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}


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


def refuses_merge(adapted: Adapted) -> bool:
    """Whether the active method is more than a change of weights, or changes a bias that a host lacks; merging must then be refused for
    that reason."""
    why = next((why for name in adapted.active if (why := adapted.methods[name].beyond)), None)
    lacking = [b.site.name for b in adapted.branches() if b.bias() is not None and b.base.bias is None]
    why = why or (f"{lacking[0]} has no bias" if lacking else None)
    assert why is None or why in refusal(NotMergeable, adapted.merge)
    return why is not None


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
    if not a.numel() and a.shape == b.shape:  # no legs yet
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
