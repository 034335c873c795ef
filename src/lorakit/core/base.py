"""How the frozen weight W (d_out × d_in) is stored: one implementation per storage, never per method.

A base holds the host module, not a copy of its weight, so that tied weights, `.to()` and checkpoint loading go on working.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.site import _is_conv1d, supported


class Base(Protocol):
    """What deltas and combines may ask of a frozen weight. The bias is never inside `matmul`: DoRA's γ must not scale it."""

    module: nn.Module

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ: [.., d_in] -> [.., d_out] (for an embedding x holds ids: [..] -> [.., d_out])."""

    def matmul_t(self, dy: Tensor) -> Tensor:
        """dy W: [.., d_out] -> [.., d_in]."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as d_out × d_in, detached."""

    def assign_(self, weight: Tensor) -> None:
        """Store `weight` (d_out × d_in) in the base's own dtype, keeping the original for `restore_`."""

    def restore_(self) -> None:
        """Put the original bits back (arithmetic undo leaves some 4 % of bf16 entries wrong)."""

    def forget_(self) -> None:
        """Drop the original: what is stored now stays."""

    @property
    def bias(self) -> Tensor | None: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class _Stored:
    """What every storage in a host module's `weight` shares; `transposed` says W = weightᵀ."""

    transposed = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: nn.Parameter | None = None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        w = self.weight.detach()
        return (w.T if self.transposed else w).to(dtype or w.dtype)

    def assign_(self, weight: Tensor) -> None:
        kept = self.kept if self.kept is not None else self.weight
        stored = (weight.T if self.transposed else weight).to(device=kept.device, dtype=kept.dtype, copy=True)
        # A new Parameter, not new data: a weight tied to another module's stays that module's, unchanged.
        self.module.weight = nn.Parameter(stored.contiguous(), requires_grad=kept.requires_grad)
        self.kept = kept

    def restore_(self) -> None:
        if self.kept is not None:
            self.module.weight, self.kept = self.kept, None

    def forget_(self) -> None:
        self.kept = None

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.weight.shape
        return (int(cols), int(rows)) if self.transposed else (int(rows), int(cols))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device


class Dense(_Stored):
    """torch.nn.Linear: weight is W."""

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return dy @ self.weight


class Transposed(_Stored):
    """Transformers' Conv1D (GPT-2): weight is Wᵀ."""

    transposed = True

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def matmul_t(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.T


class Lookup(_Stored):
    """torch.nn.Embedding: weight is Wᵀ (vocabulary × dimension) and x holds ids, that is, one-hot rows."""

    transposed = True

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.weight if x.is_floating_point() else F.embedding(x, self.weight)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.T


def base_of(module: nn.Module) -> Base:
    """The base of a supported host module."""
    factory: Callable[[nn.Module], Base]
    if supported(module) == "embedding":
        factory = Lookup
    else:
        factory = Transposed if _is_conv1d(module) else Dense
    return factory(module)
