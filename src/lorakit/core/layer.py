"""The adapted module stays in place: its class is swapped for a generated subclass whose forward adds what its child `lora` returns.

Names, isinstance, tied weights, save_pretrained, from_pretrained, deepcopy, pickle and generate go on working; detach swaps the class back.
This is the one place where something concrete is subclassed, and this forward never grows.
"""

import functools

import torch
from torch import Tensor, nn

from lorakit.core.base import Base
from lorakit.core.combine import Combine
from lorakit.core.context import Cell, Ctx
from lorakit.core.delta import Delta, Factors
from lorakit.core.generated import generate
from lorakit.core.site import Site


class RowsOf:
    """The base seen by one part of a fused weight: only the output rows in `index`."""

    def __init__(self, base: Base, index: Tensor) -> None:
        self.base, self.index = base, index
        self.module = base.module

    def matmul(self, x: Tensor) -> Tensor:
        return self.base.matmul(x).index_select(-1, self.index)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self.base.matmul_t(dy.new_zeros(*dy.shape[:-1], self.base.shape[0]).index_copy(-1, self.index, dy))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.base.dense(dtype)[self.index]

    def assign_(self, weight: Tensor) -> None:
        self.base.assign_(self.base.dense().index_copy(0, self.index, weight.to(self.base.dtype)))

    def restore_(self) -> None:
        self.base.restore_()

    def forget_(self) -> None:
        self.base.forget_()

    @property
    def bias(self) -> Tensor | None:
        return None if self.base.bias is None else self.base.bias[self.index]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.index), self.base.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device


class Branch(nn.Module):
    """One adapter at one site: its delta, its combine, and where its output rows go."""

    index: Tensor | None

    def __init__(self, site: Site, base: Base, delta: Delta, combine: Combine) -> None:
        super().__init__()
        self.site, self.delta, self.combine = site, delta, combine
        self.w = 1.0
        rows = None if site.rows is None else torch.cat([torch.arange(r.start, r.stop) for r in site.rows]).to(base.device)
        self.register_buffer("index", rows, persistent=False)
        self.host = base

    @property
    def base(self) -> Base:
        """The base as this site sees it."""
        return self.host if self.index is None else RowsOf(self.host, self.index)

    def forward(self, x: Tensor, y: Tensor, ctx: Ctx) -> Tensor:
        """What this adapter adds to the module's frozen output y."""
        if self.index is None:
            change = self.combine(x, y, self.host, self.delta, ctx)
        else:
            change = self.combine(x, y.index_select(-1, self.index), self.base, self.delta, ctx)
            change = torch.zeros_like(y, dtype=change.dtype).index_copy(-1, self.index, change)
        return (change if self.w == 1.0 else self.w * change).to(y.dtype)  # type: ignore[no-any-return]

    def weight(self) -> Tensor:
        """The change of the module's whole weight W, d_out × d_in, at the branch's current scale."""
        change = self.w * self.combine.weight(self.base, self.delta)
        if self.index is None:
            return change
        return torch.zeros(self.host.shape, dtype=change.dtype, device=change.device).index_copy(0, self.index, change)

    def factors(self) -> Factors | None:
        """The site's factors with γ filled in."""
        f = self.delta.factors()
        return None if f is None else f._replace(gain=self.combine.gain(self.base, self.delta))


class Slot(nn.Module):
    """The child `lora` of an adapted module: every adapter's branches, and which of them are active."""

    def __init__(self, base: Base, cell: Cell) -> None:
        super().__init__()
        self.base, self.cell = base, cell
        self.branches = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The module's output with its active adapters: y plus each one's change of the frozen y."""
        out = y
        for key in self.active:
            out = out + self.branches[key](x, y, self.cell.value)
        return out


def adapt(module: nn.Module, slot: Slot) -> None:
    """Swap the module's class and hang the slot on it."""
    module.lora = slot
    module.__class__ = adapted_class(type(module))  # type: ignore[arg-type]  # mypy finds no __hash__ on type[Module]


def restore(module: nn.Module) -> None:
    """Swap the class back and drop the slot."""
    module.__class__ = type(module).plain_class  # type: ignore[attr-defined]
    del module.lora


@functools.cache
def adapted_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of one module class."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.lora(x, plain.forward(self, x))  # type: ignore[operator, no-any-return]

    return generate("Adapted", adapted_class, plain, forward=forward, plain_class=plain)
