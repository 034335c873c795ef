"""How many bytes one training step needs, before it is run and while it runs (`mem_estimate`).

    total = weights + gradients + optimizer + max(activations, step)        all in bytes

weights      parameters and buffers, every storage once (tied weights are one storage)
gradients    one per parameter that receives one, in that parameter's dtype
optimizer    the state kept between steps, by `OPTIMIZERS`' formulas, or traced when a factory is given
activations  the peak of what lives above those three rows during forward and backward: tensors saved for backward, logits and
             their fp32 copies, gradients on their way; the batch itself is there before and not counted
step         the peak of what the optimizer's own step holds for a moment (a foreach AdamW on a GPU: a copy of the trained values)

Nothing is guessed: `estimate` runs forward, backward and step on a twin of the model whose tensors have shapes but no values
(FakeTensor), and follows every storage from birth to death. So it costs seconds and no memory, and works for a model on `meta`.
`measure` runs the same for real in a fresh process and reads the allocator. Gradients count as held throughout, as they are from the
second micro-batch of an accumulated step on; a step that starts from `zero_grad(set_to_none=True)` may peak lower, never higher.
Not counted: the CUDA context, cuBLAS workspaces, allocator fragmentation.

References: survey 2.3; arXiv:2403.17919 (its figures for LLaMA2-7B).
"""

import contextlib
import copy
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lorakit.core.errors import BadParameter, Incompatible, did_you_mean
from lorakit.train.metrics import forward_loss

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
Factory = Callable[[list[nn.Parameter]], Optimizer | Sequence[Optimizer]]


# ---------------------------------------------------------------------------------------------------------------- the answer
@dataclass(frozen=True)
class MemoryEstimate:
    """The rows of a training step's memory, in bytes. `resident`: the operating system's view of the activations row, where measured."""

    weights: int
    activations: int
    gradients: int
    optimizer: int
    step: int = 0
    resident: int | None = None

    @property
    def total(self) -> int:
        """The highest instant of a step: activations are gone when the optimizer works, so of the two only the larger counts."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.step)

    @property
    def binding(self) -> str:
        """The name of the largest row: where saving memory starts."""
        rows = {name: getattr(self, name) for name in _ADVICE}
        return max(rows, key=rows.__getitem__)

    def fits(self, budget: int) -> "Fit":
        """Whether a step fits into `budget` bytes, and which row to shrink if not."""
        return Fit(budget, self.total, self.binding)

    def as_dict(self) -> dict[str, int]:
        """Every row and the total, by name."""
        rows = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {**rows, "total": self.total}

    def table(self) -> Table:
        """The rows as a table in GB (10⁹ bytes) and GiB (2³⁰ bytes)."""
        table = Table("row", "GB", "GiB", "bytes", title="one training step")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, value in self.as_dict().items():
            table.add_row(name, f"{value / 1e9:.2f}", f"{value / 2**30:.2f}", f"{value:,}", style="bold" if name == "total" else None)
        return table


@dataclass(frozen=True)
class Fit:
    """The answer of `MemoryEstimate.fits`; true when the step fits."""

    budget: int
    needed: int
    binding: str

    def __bool__(self) -> bool:
        return self.needed <= self.budget

    def __str__(self) -> str:
        verdict = f"{'fits' if self else 'does not fit'}: {_gb(self.needed)} needed of {_gb(self.budget)}, most of it {self.binding}"
        return verdict if self else f"{verdict}; {_ADVICE[self.binding]}"


_ADVICE = {
    "weights": "load the base in fewer bits, or a smaller base",
    "activations": "use gradient checkpointing, a smaller batch, or shorter sequences",
    "gradients": "train fewer parameters: an adapter, or a lower rank",
    "optimizer": "train fewer parameters, or use an optimizer that keeps less state",
    "step": "train fewer parameters, or build the optimizer with foreach=False",
}


def parse_bytes(text: str) -> int:
    """`24GB` is 24·10⁹ bytes, `24GiB` is 24·2³⁰; also MB, MiB, TB, TiB and plain bytes."""
    found = re.fullmatch(r"\s*([\d_.]+)\s*(?:([kmgt])(i?))?b?\s*", text, re.IGNORECASE)
    if not found:
        raise BadParameter(f"{text!r} is not a number of bytes; write for example 24GB or 22.5GiB")
    number, prefix, binary = found.groups()
    exponent = " kmgt".index((prefix or " ").lower())
    return round(float(number) * (1024 if binary else 1000) ** exponent)


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


# ---------------------------------------------------------------------------------------------- weights, gradients, optimizer
def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each storage once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def weight_bytes(model: nn.Module) -> int:
    """Parameters and buffers, non-persistent ones included."""
    return storage_bytes([*model.parameters(), *model.buffers()])


def gradient_bytes(params: Iterable[Tensor]) -> int:
    """One gradient per trainable parameter, in its own dtype: numel × bytes."""
    return sum(_nbytes(p) for p in params if p.requires_grad)


def optimizer_bytes(params: Iterable[Tensor], optimizer: str) -> int:
    """The state of a named optimizer over the trainable parameters, by its formula."""
    state = _rule(optimizer).state
    return sum(state(p) for p in params if p.requires_grad)


@dataclass(frozen=True)
class OptimizerRule:
    """`state`: bytes kept for one parameter. `build`: the optimizer itself, whose step is traced and against which `state` is tested."""

    state: Callable[[Tensor], int]
    build: Factory


COUNTER = 4  # torch keeps each parameter's step count as one fp32 value


def _nbytes(p: Tensor) -> int:
    return p.numel() * p.element_size()


def _adam_state(p: Tensor) -> int:
    return 2 * _nbytes(p) + COUNTER


def _adafactor_state(p: Tensor) -> int:
    """A row and a column of second moments for matrices (m + n values), all of them for vectors."""
    if p.ndim < 2:
        return _nbytes(p) + COUNTER
    return (p.numel() // p.shape[-1] + p.numel() // p.shape[-2]) * p.element_size() + COUNTER


def _muon_state(p: Tensor) -> int:
    return _nbytes(p) if p.ndim == 2 else _adam_state(p)


def _foreach(params: list[nn.Parameter]) -> bool:
    """torch's own default: on a GPU whole lists at once. Said aloud because it does not recognize the twin's parameters."""
    return all(p.is_cuda for p in params)


def _muon(params: list[nn.Parameter]) -> list[Optimizer]:
    """Muon for matrices, AdamW for the rest, as its authors prescribe."""
    matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
    built: list[Optimizer] = [torch.optim.Muon(matrices)] if matrices else []
    return [*built, torch.optim.AdamW(rest, foreach=_foreach(rest))] if rest else built


OPTIMIZERS: Mapping[str, OptimizerRule] = {
    "sgd": OptimizerRule(lambda p: 0, lambda ps: torch.optim.SGD(ps, foreach=_foreach(ps))),
    "sgd+momentum": OptimizerRule(_nbytes, lambda ps: torch.optim.SGD(ps, momentum=0.9, foreach=_foreach(ps))),
    "rmsprop": OptimizerRule(lambda p: _nbytes(p) + COUNTER, lambda ps: torch.optim.RMSprop(ps, foreach=_foreach(ps))),
    "adam": OptimizerRule(_adam_state, lambda ps: torch.optim.Adam(ps, foreach=_foreach(ps))),
    "adamw": OptimizerRule(_adam_state, lambda ps: torch.optim.AdamW(ps, foreach=_foreach(ps))),
    "adafactor": OptimizerRule(_adafactor_state, torch.optim.Adafactor),
    "muon": OptimizerRule(_muon_state, _muon),
}


def _rule(name: str) -> OptimizerRule:
    if name not in OPTIMIZERS:
        raise BadParameter(f"no memory formula for the optimizer {name!r}. {did_you_mean(name, OPTIMIZERS)} Or pass a factory.")
    return OPTIMIZERS[name]


def _build(optimizer: str | Factory, params: list[nn.Parameter]) -> list[Optimizer]:
    built = (_rule(optimizer).build if isinstance(optimizer, str) else optimizer)(params)
    return [built] if isinstance(built, Optimizer) else list(built)


def _state_tensors(built: list[Optimizer]) -> list[Tensor]:
    return [t for o in built for t in tree_leaves(dict(o.state)) if isinstance(t, Tensor)]


# ------------------------------------------------------------------------------------------------------------------ estimate
def estimate(
    model: nn.Module,
    batch: Batch,
    *,
    optimizer: str | Factory,
    loss: Loss | None = None,
    checkpointing: bool = False,
    device: torch.device | str | None = None,
) -> MemoryEstimate:
    """What one training step of `model` on `batch` will need, without running it. The model and the random state are left as they are.

    Args:
        model: any module; adapted or not, on a device or on `meta`.
        batch: keyword tensors of the forward. Integers are read (masks decide which attention kernel runs), floats only for their shape.
        optimizer: a name in `OPTIMIZERS`, or a factory from the trained parameters to one or more optimizers.
        loss: (model, batch) to a scalar, using the model it is given; None for `forward_loss`, what lorakit trains with.
        checkpointing: switch on Transformers' gradient checkpointing for the trace; a model that has it on already needs nothing.
        device: where the step will run; None for where the model is, or the CPU for a model on `meta`.
    """
    with _trace(model, batch, checkpointing, device) as (twin, inputs, ledger):
        params = [p for p in twin.parameters() if p.requires_grad]
        with _settled(params, ledger.settle), ledger:
            (loss or _default_loss)(twin, inputs).backward()
        _require_gradients(model, params)
        grads = [p.grad for p in params if p.grad is not None]
        activations = ledger.peak
        state, step = _trace_step(optimizer, params, ledger)
    return MemoryEstimate(weight_bytes(model), activations, storage_bytes(grads), state, step)


def saved_bytes(
    model: nn.Module, batch: Batch, *, loss: Loss | None = None, checkpointing: bool = False, device: torch.device | str | None = None
) -> int:
    """Bytes that the forward saves for backward: unique storages, without parameters, buffers and the batch. Arguments as `estimate`."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return t

    with _trace(model, batch, checkpointing, device) as (twin, inputs, ledger):
        there = {t.untyped_storage()._cdata for t in [*twin.parameters(), *twin.buffers(), *_tensors(inputs)]}
        with ledger, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            graph = (loss or _default_loss)(twin, inputs)
        total = sum(n for key, n in saved.items() if key not in there)
        del graph  # alive until here: a freed storage's address may be given to another
    return total


@contextlib.contextmanager
def _trace(
    model: nn.Module, batch: Batch, checkpointing: bool, device: torch.device | str | None
) -> Iterator[tuple[nn.Module, Batch, "_Ledger"]]:
    """The twin in training mode, its batch, and a ledger that knows what was there before."""
    where = _device(model, device)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _twin(model, fake, where).train()
    if checkpointing:
        _enable_checkpointing(twin)
    inputs = tree_map(lambda v: _input(v, fake, where) if isinstance(v, Tensor) else v, dict(batch))
    ledger = _Ledger(fake)
    for t in [*twin.parameters(), *twin.buffers(), *_tensors(inputs)]:
        ledger.note(t, counted=False)
    with torch.random.fork_rng(devices=[]):  # the few small draws that are made for real must not move the user's stream
        yield twin, inputs, ledger


def _twin(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> nn.Module:
    """A deep copy whose parameters and buffers have shapes and strides but no values."""
    shared: dict[int, Any] = {id(t): _empty_like(t, fake, device) for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def _empty_like(t: Tensor, fake: FakeTensorMode, device: torch.device) -> Tensor:
    with fake:
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty


def _input(t: Tensor, fake: FakeTensorMode, device: torch.device) -> Tensor:
    if t.is_floating_point() or t.is_meta:
        return _empty_like(t, fake, device).requires_grad_(t.requires_grad)
    return t.to(device)


def _device(model: nn.Module, wanted: torch.device | str | None) -> torch.device:
    own = next(model.parameters()).device
    device = torch.device(wanted) if wanted is not None else torch.device("cpu") if own.type == "meta" else own
    # A CUDA tensor without values aborts the process in a build without CUDA, so it is refused here.
    if device.type not in ("cpu", own.type) and device.type != getattr(torch.accelerator.current_accelerator(), "type", None):
        raise BadParameter(f"device={str(device)!r} is not on this machine; trace on 'cpu' instead: its attention kernels save the same tensors")
    return device


def _default_loss(model: nn.Module, batch: Batch) -> Tensor:
    return forward_loss(model, batch)[0]


def _enable_checkpointing(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise Incompatible(f"checkpointing=True needs a Transformers model, not {type(model).__name__}; checkpoint inside its forward instead")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _require_gradients(model: nn.Module, params: list[nn.Parameter]) -> None:
    for p in model.parameters():
        if isinstance(p.grad, FakeTensor) and not isinstance(p, FakeTensor):
            p.grad = None
    if all(p.grad is None for p in params):
        raise BadParameter("no trainable parameter received a gradient; is anything trainable, and does loss use the model it is given?")


@contextlib.contextmanager
def _settled(params: list[nn.Parameter], settle: Callable[[Tensor], None]) -> Iterator[None]:
    """Each gradient moves to its own row the moment it lands in `.grad`."""
    handles = [p.register_post_accumulate_grad_hook(lambda p: settle(p.grad)) for p in params]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace_step(optimizer: str | Factory, params: list[nn.Parameter], ledger: "_Ledger") -> tuple[int, int]:
    """(state, transient) bytes of the optimizer; the second step's transient, because the first one also makes the state."""
    trained = [p for p in params if p.grad is not None]
    ledger.unread = 1.0
    with ledger:
        built = _build(optimizer, trained)
        _step(built)
        base = ledger.restart()
        _step(built)
    state = optimizer_bytes(trained, optimizer) if isinstance(optimizer, str) else storage_bytes(_state_tensors(built))
    return state, ledger.peak - base


def _step(built: list[Optimizer]) -> None:
    for o in built:
        o.step()


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class _Ledger(TorchDispatchMode):
    """Live bytes after every call: a storage is entered when a call first returns it and struck out when it dies.

    Calls on the twin's tensors compute shapes only. Integers that follow from the batch alone keep their values, so that what a model
    decides from them (is this mask all ones? how many labels are there?) is decided as in the real run.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.now = self.peak = 0
        self.entries: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.unread: float | None = None
        """What a value that nobody computed reads as; None: reading one is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = self.call(func, args, kwargs or {})
        for t in _tensors(out):
            self.note(t)
        return out

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if any(isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs))):
                return func(*tree_map(_as_positions, args), **kwargs) if func in _INDEXED else func(*args, **kwargs)
            return self.small(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as e:
            if self.unread is not None and func is torch.ops.aten._local_scalar_dense.default:
                return self.unread
            raise Incompatible(f"the model reads values that it computed ({func}), which no trace has; use measure(), a real run") from e

    def small(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call without the twin's tensors: done for real if it yields integers or a single value, else for its shape."""
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        small = all(t.numel() <= 1 or not (t.is_floating_point() or t.is_complex()) for t in _tensors(out))
        return func(*args, **kwargs) if small else out

    def note(self, t: Tensor, *, counted: bool = True) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.entries:
            self.entries[key] = (weakref.ref(storage, lambda _: self.strike(key)), storage.nbytes() if counted else 0)
            self.now += self.entries[key][1]
            self.peak = max(self.peak, self.now)

    def strike(self, key: int) -> None:
        self.now -= self.entries.pop(key)[1]

    def settle(self, t: Tensor) -> None:
        """Stop counting a tensor that lives on under another row."""
        key = t.untyped_storage()._cdata
        ref, nbytes = self.entries[key]
        self.entries[key] = (ref, 0)
        self.now -= nbytes

    def restart(self) -> int:
        """Forget the peak so far; returns what lives now."""
        self.peak = self.now
        return self.now


_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


def _as_positions(arg: Any) -> Any:
    """A real Boolean mask as the positions that it selects: their number is then a shape."""
    real_mask = isinstance(arg, Tensor) and arg.dtype == torch.bool and not isinstance(arg, FakeTensor)
    return arg.nonzero().unbind(1)[0] if real_mask and arg.ndim == 1 else arg


# ------------------------------------------------------------------------------------------------------------------- measure
