"""NF4 as a base: what deltas and combines see of a packed weight, and the value by which a method or `lorakit.quantize` asks for one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.base import Dense, Transposed, Turned, base_of
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.site import Where
from lorakit.parts.bases.host import Held, decoded, enter, held, leave, packed_in, product, put
from lorakit.parts.bases.nf4 import BLOCKSIZES
from lorakit.parts.bases.packed import Layout, Packed


class NF4:
    """A packed W. What is assigned to it is packed too and loses what lies between two levels, unless it is open."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: tuple[nn.Parameter, Tensor, Tensor | None] | None = None
        self.plain = (Transposed if self.held.transposed else Dense)(module)

    @property
    def held(self) -> Held:
        return held(self.module)

    def matmul(self, x: Tensor) -> Tensor:
        packed = packed_in(self.module)
        return self.plain.matmul(x) if packed is None else product(self.module, packed, x)

    def matmul_t(self, dy: Tensor) -> Tensor:
        packed = packed_in(self.module)
        return self.plain.matmul_t(dy) if packed is None else product(self.module, packed, dy, transposed=True)

    def bound(self) -> Turned:
        packed = packed_in(self.module)
        return self.plain.bound() if packed is None else partial(_decoded_product, self.module, packed)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        packed = packed_in(self.module)
        return self.plain.dense(dtype) if packed is None else decoded(self.module, packed).to(dtype or self.dtype)

    def open_(self) -> None:
        if packed_in(self.module) is not None:
            self._put(self.dense())

    def assign_(self, weight: Tensor) -> None:
        packed = packed_in(self.module)
        self._put(weight.to(self.device) if packed is None else Packed.of(weight.to(self.device), self.held.layout))

    def _put(self, new: Tensor | Packed) -> None:
        """Set W, keeping what was there first."""
        if self.kept is None:
            self.kept = (self.plain.weight, self.module.scales, self.module.nested)  # type: ignore[assignment]
        if isinstance(new, Packed):
            return put(self.module, new)
        stored = (new.T if self.held.transposed else new).to(self.dtype, copy=True).contiguous()
        self.module.weight = nn.Parameter(stored, requires_grad=False)

    def shift_(self, change: Tensor) -> None:
        self.plain.shift_(change)

    def restore_(self) -> None:
        self.plain.restore_()
        if self.kept is not None:
            self.module.weight, scales, nested = self.kept
            self.module.register_buffer("scales", scales, persistent=False)
            self.module.register_buffer("nested", nested, persistent=False)
            self.kept = None

    def forget_(self) -> None:
        self.kept = None
        self.plain.forget_()

    def expand_(self) -> None:
        self.open_()
        self.forget_()
        leave(self.module)

    @property
    def bias(self) -> Tensor | None:
        return self.plain.bias

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.layout.d_out, self.held.layout.d_in

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def device(self) -> torch.device:
        return self.plain.device


def _decoded_product(module: nn.Module, packed: Packed, dy: Tensor, dx: Tensor | None) -> Tensor:
    found = product(module, packed, dy, transposed=True)
    return found if dx is None else dx.add_(found)


@dataclass(frozen=True)
class NF4Spec:
    """Store linear weights in NF4. `double_quant`: the scales too in one byte (4.127 bits a parameter, else 4.5); `sites`: which ones, by
    default all linear layers but heads, as the paper does, whichever of them are adapted."""

    double_quant: bool = True
    blocksize: int = 64
    sites: Where = "all-linear"

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCKSIZES:
            raise BadParameter(f"blocksize={self.blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")

    def store(self, module: nn.Module, *, keep: bool = True) -> Callable[[], None]:
        base: Any = base_of(module)
        d_out, d_in = base.shape
        layout = Layout(d_out, d_in, base.dtype, self.blocksize, self.double_quant)
        if isinstance(base, NF4):
            return _as_it_is(base.held.layout, layout)
        if not isinstance(base, Dense | Transposed):
            raise Incompatible(f"{type(module).__name__} is stored as {type(base).__name__}: only plain linear weights can become NF4")
        enter(module, layout, NF4, keep=keep)
        return partial(leave, module) if keep else lambda: None


def _as_it_is(found: Layout, wanted: Layout) -> Callable[[], None]:
    """The undo of nothing. Raises Incompatible for NF4 of another kind."""
    if (found.blocksize, found.double_quant) != (wanted.blocksize, wanted.double_quant):
        raise Incompatible(
            f"the base is stored as NF4 with blocksize {found.blocksize} and double_quant {found.double_quant}; "
            f"this asks for {wanted.blocksize} and {wanted.double_quant}: give the same"
        )
    return lambda: None
