"""How the frozen weight W (d_out × d_in) is stored: one implementation per storage, never per method.

A base holds the host module, not a copy of its weight, so that tied weights, `.to()` and checkpoint loading go on working.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.errors import Incompatible, NotMergeable
from lorakit.core.experts import stack_shape
from lorakit.core.site import Where, _is_conv1d, select, supported
from lorakit.ops.grouped import each

Turned = Callable[[Tensor, Tensor | None], Tensor]
"""(dy [n, d_out], dx [n, d_in] or None) -> dy W, added to dx in place."""


class Base(Protocol):
    """What deltas and combines may ask of a frozen weight. The bias is never inside `matmul`: DoRA's γ must not scale it."""

    module: nn.Module

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ: [.., d_in] -> [.., d_out] (for an embedding x holds ids: [..] -> [.., d_out])."""

    def matmul_t(self, dy: Tensor) -> Tensor:
        """dy W: [.., d_out] -> [.., d_in]."""

    def bound(self) -> Turned:
        """dy, dx -> dy W, added to dx in place where that is given: of W as it is now, whatever becomes of it before a backward."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as d_out × d_in, detached."""

    def open_(self) -> None:
        """Hold W densely until `restore_`, so that what is assigned loses nothing but its rounding to `dtype`."""

    def assign_(self, weight: Tensor) -> None:
        """Store `weight` (d_out × d_in) as the base is stored, keeping the original for `restore_`."""

    def shift_(self, change: Tensor) -> None:
        """Add to the bias, which there must be, keeping the original for `restore_`."""

    def restore_(self) -> None:
        """Put the original bits back (arithmetic undo leaves some 4 % of bf16 entries wrong)."""

    def forget_(self) -> None:
        """Drop the original: what is stored now stays."""

    def expand_(self) -> None:
        """Store W densely from now on, in a plain module without an adapter. Nothing is kept."""

    @property
    def bias(self) -> Tensor | None: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def _product(W: Tensor, dy: Tensor, dx: Tensor | None) -> Tensor:
    return dy @ W if dx is None else dx.addmm_(dy, W)


class _Stored:
    """What every storage in a host module's `weight` shares; `transposed` says W = weightᵀ."""

    transposed = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: nn.Parameter | None = None
        self.kept_bias: nn.Parameter | None = None

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

    def shift_(self, change: Tensor) -> None:
        bias = self.bias
        assert bias is not None
        kept = self.kept_bias if self.kept_bias is not None else self.module._parameters["bias"]
        assert kept is not None
        wide = torch.promote_types(bias.dtype, change.dtype)
        self.module.bias = nn.Parameter((bias.detach().to(wide) + change).to(kept.dtype), requires_grad=kept.requires_grad)
        self.kept_bias = kept

    def restore_(self) -> None:
        if self.kept is not None:
            self.module.weight, self.kept = self.kept, None
        if self.kept_bias is not None:
            self.module.bias, self.kept_bias = self.kept_bias, None

    def forget_(self) -> None:
        self.kept = self.kept_bias = None

    def expand_(self) -> None:
        return None

    def open_(self) -> None:
        return None

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

    def bound(self) -> Turned:
        return partial(_product, self.weight)


class Transposed(_Stored):
    """Transformers' Conv1D (GPT-2): weight is Wᵀ."""

    transposed = True

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def matmul_t(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.T

    def bound(self) -> Turned:
        return partial(_product, self.weight.T)


class Lookup(_Stored):
    """torch.nn.Embedding: weight is Wᵀ (vocabulary × dimension) and x holds ids, that is, one-hot rows."""

    transposed = True

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.weight if x.is_floating_point() else F.embedding(x, self.weight)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.T

    def bound(self) -> Turned:
        return partial(_product, self.weight.T)


class Stacked:
    """The weights of all experts of a module in one parameter (core/experts.py): W is E × d_out × d_in."""

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.module, self.attribute = module, attribute
        self.kept: nn.Parameter | None = None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.attribute)

    def matmul(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """x W_eᵀ of rows sorted by expert [n, d_in], or of rows for each expert [E, n, d_in]."""
        return each(x, self._turned(self.weight), ends)

    def matmul_t(self, dy: Tensor) -> Tensor:
        """dy W_e of rows for each expert, [E, n, d_out]."""
        return dy @ self._turned(self.weight)

    def bound(self) -> Turned:
        return partial(_product, self._turned(self.weight))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """E × d_out × d_in, detached."""
        return self._turned(self.weight.detach()).to(dtype or self.dtype)

    def assign_(self, weight: Tensor) -> None:
        kept = self.kept if self.kept is not None else self.weight
        stored = self._turned(weight).to(device=kept.device, dtype=kept.dtype, copy=True)
        setattr(self.module, self.attribute, nn.Parameter(stored.contiguous(), requires_grad=kept.requires_grad))
        self.kept = kept

    def shift_(self, change: Tensor) -> None:
        raise NotMergeable("no adapter changes the biases of experts")

    def restore_(self) -> None:
        if self.kept is not None:
            setattr(self.module, self.attribute, self.kept)
            self.kept = None

    def forget_(self) -> None:
        self.kept = None

    def expand_(self) -> None:
        return None

    def open_(self) -> None:
        return None

    def _turned(self, stored: Tensor) -> Tensor:
        return stored.mT if self.module.is_transposed else stored

    @property
    def bias(self) -> Tensor | None:
        """E × d_out."""
        return self.module.get_parameter(self.attribute + "_bias") if self.module.has_bias else None

    @property
    def experts(self) -> int:
        return stack_shape(self.module, self.attribute)[0]

    @property
    def shape(self) -> tuple[int, int]:
        return stack_shape(self.module, self.attribute)[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device


class BaseSpec(Protocol):
    """A value that says how frozen weights are stored (quantized)."""

    @property
    def sites(self) -> Where:
        """Which linear weights, whether or not an adapter is there."""

    def store(self, module: nn.Module, *, keep: bool = True) -> Callable[[], None]:
        """Swap a linear host's storage in place and return the exact undo; without `keep` the original weight is dropped and the undo void.

        The new class has an attribute `storage`, the Base of such a module. A host already stored so is left as it is; another storage
        raises Incompatible."""


def hosts(model: nn.Module, where: Where) -> list[nn.Module]:
    """The linear modules that a BaseSpec with these sites stores: not those that the architecture itself keeps in fp32 (its forward reads
    their weight's dtype), nor tied ones."""
    wide = {word for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict") for word in getattr(model, name, None) or ()}
    owners = Counter(id(module._parameters.get("weight")) for module in model.modules())
    paths = dict.fromkeys(s.module for s in select(model, where) if s.kind == "linear" and not wide & set(s.name.split(".")))
    found = {path: model.get_submodule(path) for path in paths}
    for path, module in found.items():
        if owners[id(module._parameters["weight"])] > 1:
            raise Incompatible(f"{path} shares its weight with another module and cannot be stored in another form; leave it out")
    return list(found.values())


def added(base: Base, change: Tensor) -> Tensor:
    """W + change, at least in fp32; W itself is left as it is."""
    W = base.dense(change.dtype)
    return W + change if base.dtype == change.dtype else W.add_(change)  # a cast has made a copy


def expand(model: nn.Module) -> nn.Module:
    """Every weight dense again, in plain modules: what it decodes to. The model must have no adapter."""
    stored = [module for module in model.modules() if getattr(type(module), "storage", None) is not None]
    for module in stored:
        base_of(module).expand_()
    if stored and (config := getattr(model, "config", None)) is not None:
        config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("quantized", None)
    return model


def numel(model: nn.Module) -> int:
    """Entries of the model's parameters; a packed weight counts as what it stands for."""
    packed = [m for m in model.modules() if getattr(type(m), "storage", None) is not None and not m.weight.is_floating_point()]  # type: ignore[operator]
    shapes = {id(m.weight): base_of(m).shape for m in packed}
    return sum(math.prod(shapes.get(id(p), p.shape)) for p in model.parameters())


def base_of(module: nn.Module, attribute: str = "weight") -> Base:
    """The base of a supported host module's weight."""
    if attribute != "weight":
        return Stacked(module, attribute)
    factory: Callable[[nn.Module], Base] | None = getattr(type(module), "storage", None)
    if factory is None and supported(module) == "embedding":
        factory = Lookup
    elif factory is None:
        factory = Transposed if _is_conv1d(module) else Dense
    return factory(module)
