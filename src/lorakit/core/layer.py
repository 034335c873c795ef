"""The adapted module stays in place: its class is swapped for a generated subclass whose forward adds what its child `lora` returns.

Names, isinstance, tied weights, save_pretrained, from_pretrained, deepcopy, pickle and generate go on working; detach swaps the class back.
This is the one place where something concrete is subclassed, and this forward never grows.
"""

from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.base import Base, Dense, base_of
from lorakit.core.combine import Combine
from lorakit.core.context import Cell, Ctx
from lorakit.core.delta import Delta, Factors
from lorakit.core.errors import Incompatible
from lorakit.core.experts import forward_of, stacked
from lorakit.core.generated import generate
from lorakit.core.router import router_forward, routes
from lorakit.core.site import Site
from lorakit.ops.lora_linear import Layer, lora_linear


class RowsOf:
    """The base seen by one part of a fused weight: only the output rows in `index`."""

    def __init__(self, base: Base, index: Tensor) -> None:
        self.base, self.index = base, index
        self.module = base.module

    def matmul(self, x: Tensor) -> Tensor:
        return self.base.matmul(x).index_select(-1, self.index)

    def matmul_t(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        return self.base.matmul_t(dy.new_zeros(*dy.shape[:-1], self.base.shape[0]).index_copy(-1, self.index, dy), into)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.base.dense(dtype).index_select(-2, self.index)

    def open_(self) -> None:
        self.base.open_()

    def assign_(self, weight: Tensor) -> None:
        self.base.assign_(self.base.dense().index_copy(-2, self.index, weight.to(self.base.dtype)))

    def shift_(self, change: Tensor) -> None:
        self.base.shift_(change.new_zeros(self.base.shape[0]).index_copy(0, self.index, change))

    def restore_(self) -> None:
        self.base.restore_()

    def forget_(self) -> None:
        self.base.forget_()

    def expand_(self) -> None:
        self.base.expand_()

    @property
    def bias(self) -> Tensor | None:
        return None if self.base.bias is None else self.base.bias.index_select(-1, self.index)

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

    def layer(self, x: Tensor, ctx: Ctx) -> Layer | None:
        """The module with this adapter as the fused function takes it (ops/lora_linear.py); None where it is of another form."""
        if self.index is not None or self.site.kind != "linear" or not self.combine.fuses:
            return None
        if any(part._forward_hooks or part._forward_pre_hooks for part in (self, self.combine, self.delta)):  # someone watches them run
            return None
        if self.host.module.weight.requires_grad:  # trained whole beside the adapter
            return None
        f = self.delta.product(ctx)
        if f is None:
            return None
        mask, gain = self.delta.mask(x, ctx), self.combine.gain(self.host, self.delta)
        if gain is not None and (mask is not None or self.w != 1.0):
            return None
        dense = self.host.dense if isinstance(self.host, Dense) and self.host.dtype == f.A.dtype else None
        call = partial(frozen, self.host.module)
        return Layer(call, self.host.matmul_t, f.s * self.w, f.A, f.B, f.g, f.b, gain, self.host.bias, mask, dense)

    def forward(self, x: Tensor, y: Tensor, ctx: Ctx) -> Tensor:
        """What this adapter adds to the module's frozen output y."""
        if self.index is None:
            change = self.combine(x, y, self.host, self.delta, ctx)
        else:
            change = self.combine(x, y.index_select(-1, self.index), self.base, self.delta, ctx)
            change = torch.zeros_like(y, dtype=change.dtype).index_copy(-1, self.index, change)
        return (change if self.w == 1.0 else self.w * change).to(y.dtype)  # type: ignore[no-any-return]

    def expel(self) -> None:
        """Give the base the bits back that it had before it absorbed a part of the delta."""
        if self.delta.absorbed:
            self.base.restore_()
            self.delta.absorbed = 0

    def bias(self) -> Tensor | None:
        """The change of the module's whole bias at the branch's current scale, or None."""
        change = self.combine.bias(self.base, self.delta)
        if change is None or self.index is None:
            return None if change is None else self.w * change
        return change.new_zeros(self.host.shape[0]).index_copy(0, self.index, self.w * change)

    def weight(self) -> Tensor:
        """The change of the module's whole weight W, d_out × d_in, at the branch's current scale."""
        change = self.w * self.combine.weight(self.base, self.delta)
        if self.index is None:
            return change
        return change.new_zeros(*change.shape[:-2], *self.host.shape).index_copy(-2, self.index, change)

    def factors(self) -> Factors | None:
        """The site's factors with γ filled in."""
        f = self.delta.factors()
        return None if f is None else f._replace(gain=self.combine.gain(self.base, self.delta))


class Ready(NamedTuple):
    """An output that another slot's forward has left: of which x, and in which state of things."""

    x: Tensor
    stamp: tuple[object, ...]
    y: Tensor


class Slot(nn.Module):
    """The child `lora` of an adapted module: every adapter's branches, and which of them are active. A site that is only read by a delta
    elsewhere has a slot without branches.

    `group`: the slots of modules that usually read the same input (q, k, v; gate, up), this one among them. Whichever runs first computes
    all of them at once and leaves the others their outputs."""

    def __init__(self, path: str, base: Base, cell: Cell) -> None:
        super().__init__()
        self.path, self.base, self.cell = path, base, cell
        self.branches = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.group: tuple[Slot, ...] = ()
        self.ready: Ready | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The module's output with its active adapters."""
        if self.cell.reads and self.path in self.cell.reads:  # in two steps: a compiled layer should not depend on its path
            self.cell.value.memo[self.path] = x
        fused = self.fused(x)
        if fused is not None:
            return fused
        out = y = frozen(self.base.module, x)
        for key in self.active:
            out = out + self.branches[key](x, y, self.cell.value)
        return out

    def fused(self, x: Tensor) -> Tensor | None:
        """The same by the fused function, where one adapter of its form is active. A compiler fuses by itself."""
        if torch.compiler.is_compiling():
            return None
        ready, self.ready = self.ready, None  # taken at once: another thread may be in the same forward
        if ready is not None and ready.x is x and ready.stamp == self.stamp(x):
            return ready.y
        layer = self.layer(x)
        if layer is None:
            return None
        found = [(slot, slot.layer(x)) for slot in self.group if slot is not self]
        others = [(slot, one) for slot, one in found if one is not None]
        y, *rest = lora_linear(x, [layer, *(one for _, one in others)])
        for (slot, _), output in zip(others, rest, strict=True):
            slot.ready = Ready(x, slot.stamp(x), output)
        return y

    def stamp(self, x: Tensor) -> tuple[object, ...]:
        """What must be as it was for an output to be that of now: nothing written into x or the adapter, and the same mode."""
        branch = self.branches[self.active[0]]
        written = [t._version for t in (x, *branch.parameters(), *branch.buffers()) if not t.is_inference()]
        return self.active, torch.is_grad_enabled(), self.training, *written

    def layer(self, x: Tensor) -> Layer | None:
        """What the fused function takes; None where it does not apply."""
        if len(self.active) != 1 or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return None
        branch: Branch = self.branches[self.active[0]]  # type: ignore[assignment]
        return branch.layer(x, self.cell.value)


def slots_of(module: nn.Module) -> list[Slot]:
    """The slots of an adapted module: one, or one for each stacked weight of experts; none where it is not adapted."""
    lora = module._modules.get("lora")
    found = list(lora.values()) if isinstance(lora, nn.ModuleDict) else [lora]
    return [slot for slot in found if isinstance(slot, Slot)]


def adapt(module: nn.Module, path: str, cell: Cell) -> None:
    """Swap the module's class and hang its slots on it."""
    names = stacked(module)
    if names and module._is_expert_parallel:
        raise Incompatible(f"{path} holds a part of its experts only (expert parallelism): load the model without it to adapt them")
    slots = {name: Slot(f"{path}.{name}", base_of(module, name), cell) for name in names}
    own = Slot(f"{path}.weight" if routes(module) else path, base_of(module), cell) if not names else None
    make = mixture_class if names else router_class if routes(module) else adapted_class
    module.lora = (nn.ModuleDict(slots) if own is None else own).train(module.training)
    module.__class__ = make(type(module))  # type: ignore[arg-type]  # mypy finds no __hash__ on type[Module]


def restore(module: nn.Module) -> None:
    """Swap the class back and drop the slot."""
    module.__class__ = type(module).plain_class  # type: ignore[attr-defined]
    del module.lora


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """What an adapted module puts out without its adapters."""
    plain: type[nn.Module] = type(module).plain_class  # type: ignore[attr-defined]
    return plain.forward(module, x)  # type: ignore[no-any-return]


@cache
def adapted_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of one module class."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.lora(x)  # type: ignore[operator, no-any-return]

    return generate("Adapted", adapted_class, plain, forward=forward, plain_class=plain)


@cache
def mixture_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a class of experts (core/experts.py)."""
    return generate("Adapted", mixture_class, plain, forward=forward_of(plain), plain_class=plain)


@cache
def router_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a class of routers (core/router.py)."""
    return generate("Adapted", router_class, plain, forward=router_forward(plain), plain_class=plain)
