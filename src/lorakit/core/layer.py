"""The adapted module stays in place: its class is swapped for a generated subclass whose forward adds what its child `lora` returns.

Names, isinstance, tied weights, save_pretrained, from_pretrained, deepcopy, pickle and generate go on working; detach swaps the class back.
This is the one place where something concrete is subclassed, and this forward never grows.
"""

from functools import cache, partial

import torch
from torch import Tensor, nn

from lorakit.core.base import Base, Dense, Turned, base_of
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

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self.base.matmul_t(self._whole(dy))

    def bound(self) -> Turned:
        turned = self.base.bound()
        return lambda dy, dx: turned(self._whole(dy), dx)

    def _whole(self, dy: Tensor) -> Tensor:
        """dy at this part's rows, zero at the others."""
        return dy.new_zeros(*dy.shape[:-1], self.base.shape[0]).index_copy(-1, self.index, dy)

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
        host = self.host.module
        if self.index is not None or self.site.kind != "linear" or not self.combine.fuses:
            return None
        weight: Tensor = host.weight  # type: ignore[assignment]
        if weight.requires_grad:  # trained whole beside the adapter
            return None
        if any(map(_watched, (self, self.combine, self.delta))) or "forward" in vars(host):
            return None
        f = self.delta.product(ctx)
        if f is None:
            return None
        mask = self.delta.mask(x, ctx)
        if self.combine.rescales and (mask is not None or self.w != 1.0):
            return None
        gain = self.combine.gain(self.host, self.delta)
        dense = weight.detach if isinstance(self.host, Dense) and self.host.dtype == f.A.dtype else None
        return Layer(partial(frozen, host), self.host.bound(), f.s * self.w, f.A, f.B, f.g, f.b, gain, self.host.bias, mask, dense)

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
        change = self.combine.weight(self.base, self.delta)
        if self.w != 1.0:
            change = self.w * change
        if self.index is None:
            return change
        return change.new_zeros(*change.shape[:-2], *self.host.shape).index_copy(-2, self.index, change)

    def factors(self) -> Factors | None:
        """The site's factors with γ filled in."""
        f = self.delta.factors()
        return None if f is None else f._replace(gain=self.combine.gain(self.base, self.delta))


def _watched(part: nn.Module) -> bool:
    """Whether someone hangs on a part's forward, to look at it or to fetch its weights first."""
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return bool(hooks) or "forward" in vars(part)


class Group:
    """Slots of modules that usually read one input (core/group.py). While their parent runs, whichever runs first computes all of them at
    once and leaves the others their outputs."""

    def __init__(self, slots: "list[Slot]") -> None:
        self.slots = slots
        self.left: dict[Slot, tuple[Tensor, Tensor]] | None = None
        """(x, output) by slot; None while the parent does not run."""
        self.led = False


class Slot(nn.Module):
    """The child `lora` of an adapted module: every adapter's branches, and which of them are active. A site that is only read by a delta
    elsewhere has a slot without branches."""

    def __init__(self, path: str, base: Base, cell: Cell) -> None:
        super().__init__()
        self.path, self.base, self.cell = path, base, cell
        self.branches = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.group: Group | None = None

    def forward(self, x: Tensor, module: nn.Module) -> Tensor:
        """What `module`, the slot's own or a replica of it, puts out with its active adapters."""
        if self.cell.reads and self.path in self.cell.reads:  # in two steps: a compiled layer should not depend on its path
            self.cell.value.memo[self.path] = x
        if module is self.base.module and (fused := self.fused(x)) is not None:
            return fused
        out = y = frozen(module, x)
        for key in self.active:
            out = out + self.branches[key](x, y, self.cell.value)
        return out

    def fused(self, x: Tensor) -> Tensor | None:
        """The same by the fused function, where one adapter of its form is active and gradients are wanted. A compiler fuses by itself."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        left = None if self.group is None else self.group.left
        seen, output = (None, None) if left is None else left.pop(self, (None, None))
        if seen is x:
            return output
        layer = self.layer(x)
        if layer is None:
            return None
        others = [] if self.group is None or left is None or self.group.led else self._others(self.group, x)
        y, *rest = lora_linear(x, [layer, *(one for _, one in others)])
        if self.group is not None and left is not None:
            self.group.led = True
            left |= {slot: (x, output) for (slot, _), output in zip(others, rest, strict=True)}
        return y

    def layer(self, x: Tensor) -> Layer | None:
        """What the fused function takes; None where it does not apply."""
        if len(self.active) != 1 or not x.is_floating_point() or x.is_meta or x.is_nested or torch.is_autocast_enabled(x.device.type):
            return None
        if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
            return None
        branch: Branch = self.branches[self.active[0]]  # type: ignore[assignment]
        return branch.layer(x, self.cell.value)

    def _others(self, group: Group, x: Tensor) -> "list[tuple[Slot, Layer]]":
        found = [(slot, slot.layer(x)) for slot in group.slots if slot is not self]
        return [(slot, one) for slot, one in found if one is not None]


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
        return self.lora(x, self)  # type: ignore[operator, no-any-return]

    return generate("Adapted", adapted_class, plain, forward=forward, plain_class=plain)


@cache
def mixture_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a class of experts (core/experts.py)."""
    return generate("Adapted", mixture_class, plain, forward=forward_of(plain), plain_class=plain)


@cache
def router_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a class of routers (core/router.py)."""
    return generate("Adapted", router_class, plain, forward=router_forward(plain), plain_class=plain)
