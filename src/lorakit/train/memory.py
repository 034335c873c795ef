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
import itertools
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
from lorakit.parts.bases.matmul import SCRATCH
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
        caption = "total: the larger of activations and step, and all of the rest"
        table = Table("row", "GB", "GiB", "bytes", title="one training step", caption=caption)
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
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text, re.IGNORECASE)
    if not found:
        raise BadParameter(f"{text!r} is not a number of bytes; write for example 24GB or 22.5GiB")
    number, prefix, binary = found.groups()
    unit = 1024.0 if binary else 1000.0
    return round(float(number) * unit ** " kmgt".index((prefix or " ").lower()))


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


# ---------------------------------------------------------------------------------------------- weights, gradients, optimizer
def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each storage once."""
    sizes: dict[int, int] = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(sizes.values())


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
        params = _trainable(twin)
        with _settled(params, ledger.settle), ledger:
            (loss or _default_loss)(twin, inputs).backward()
        _check_reached(model, params)
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
    if wanted is None:
        return torch.device("cpu") if own.type == "meta" else own
    device, accelerator = torch.device(wanted), torch.accelerator.current_accelerator()
    # In a build without CUDA even a CUDA tensor without values aborts the whole process, so it is refused here.
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise BadParameter(f"device={str(device)!r} is not on this machine; device='cpu' gives nearly the same rows")
    return device


def _default_loss(model: nn.Module, batch: Batch) -> Tensor:
    return forward_loss(model, batch)[0]


def _enable_checkpointing(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise Incompatible(f"checkpointing=True needs a Transformers model, not {type(model).__name__}; checkpoint in its forward instead")
    # Transformers 5 renamed the method on the way; the old name warns
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise BadParameter("nothing is trainable: every parameter has requires_grad=False; attach a method, or unfreeze something")
    return params


def _check_reached(model: nn.Module, params: list[nn.Parameter]) -> None:
    """A loss that calls the user's own model leaves the twin without gradients, and the model with ones that have no values."""
    for p in model.parameters():
        p.grad = None if isinstance(p.grad, FakeTensor) else p.grad
    if all(p.grad is None for p in params):
        raise BadParameter("no trainable parameter received a gradient: loss must use the model it is given, not one of its own")


@contextlib.contextmanager
def _settled(params: list[nn.Parameter], settle: Callable[[Tensor], None]) -> Iterator[None]:
    """Each gradient moves to its own row the moment it lands in `.grad`."""
    handles = [p.register_post_accumulate_grad_hook(lambda p: settle(p.grad)) for p in params]
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
        before, beside = SCRATCH[func](*args, **(kwargs or {})) if func in SCRATCH else (0, 0)
        self.peak = max(self.peak, self.now + before)
        out = self.call(func, args, kwargs or {})
        for t in _tensors(out):
            self.note(t)
        self.peak = max(self.peak, self.now + beside)
        return out

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if any(isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs))):
                if func in _INDEXED:
                    args = (args[0], _positions(args[1]), *args[2:])
                return _grouped(*args[:3]) if func is torch.ops.aten._grouped_mm.default else func(*args, **kwargs)
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


def _grouped(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """The product of groups of rows, [n, k] by [E, k, m] or in backward [k, n] by [n, m]: torch's own rule of shapes knows bf16 only."""
    rows = (left.shape[0],) if right.dim() == 3 else (ends.shape[0], left.shape[0])
    return left.new_empty(*rows, right.shape[-1])


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The indices with each real Boolean mask replaced by the positions that it selects: how many is then a matter of shapes."""
    out: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        out += index.nonzero().unbind(1) if is_mask and index is not None else [index]
    return out


# ------------------------------------------------------------------------------------------------------------------- measure
def measure(
    model: nn.Module, batch: Batch, *, optimizer: str | Factory, loss: Loss | None = None, checkpointing: bool = False
) -> MemoryEstimate:
    """The rows of `estimate` from real steps in a fresh process, on the model's own device; arguments as there.

    On CUDA the peak is `torch.cuda.max_memory_allocated`'s, on the CPU the running sum of torch's allocator events; `resident` is the rise
    of the process's resident set at its highest (Linux and CPU only). The model goes to the child by pickle: `loss` and a factory must be
    importable there, so no lambdas.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.pt"), Path(folder, "rows.json")
        torch.save((model, dict(batch), optimizer, loss, checkpointing), job)
        # Large blocks straight from the system and back to it: else freed memory stays resident and hides the next peak.
        env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        code = "import sys; from lorakit.train.memory import _measure_file; _measure_file(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(job), str(result)], env={**os.environ, **env}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"the measuring process ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        return MemoryEstimate(**json.loads(result.read_text()))


def _measure_file(job: str, result: str) -> None:
    """The child's whole work."""
    model, batch, optimizer, loss, checkpointing = torch.load(job, weights_only=False)
    if checkpointing:
        _enable_checkpointing(model)
    rows = _measure_here(model.train(), batch, optimizer, loss or _default_loss)
    Path(result).write_text(json.dumps(dataclasses.asdict(rows)))


def _measure_here(model: nn.Module, batch: Batch, optimizer: str | Factory, loss: Loss) -> MemoryEstimate:
    params = _trainable(model)
    device = params[0].device

    def backward() -> None:
        loss(model, batch).backward()

    backward()  # gradients appear, and with the first step the state: from here on only the peaks are new
    params = [p for p in params if p.grad is not None]
    built = _build(optimizer, params)
    _step(built)
    for o in built:
        o.zero_grad(set_to_none=False)
    resident = _resident_rise(backward) if device.type == "cpu" else None
    peak = _PEAKS[device.type]
    activations, step = peak(backward), peak(lambda: _step(built))
    grads = storage_bytes([p.grad for p in params if p.grad is not None])
    return MemoryEstimate(weight_bytes(model), activations, grads, storage_bytes(_state_tensors(built)), step, resident)


def _cpu_peak(work: Callable[[], None]) -> int:
    """The highest sum of torch's CPU allocations minus frees while `work` runs."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    events: Any = run.profiler.kineto_results.events()  # run.events() gives calls, whose sums hide the peak inside a call
    sizes: list[int] = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes, initial=0))


def _cuda_peak(work: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


_PEAKS = {"cpu": _cpu_peak, "cuda": _cuda_peak}


def _resident_rise(work: Callable[[], None]) -> int | None:
    """By how much the process's resident set rose at its highest; None where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    """One entry of Linux's /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def used_bytes() -> int:
    """What the run needs: the peak of CUDA allocations once CUDA is in use, else the process's resident memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident_bytes()


def resident_bytes() -> int:
    """What this process holds now: resident memory on Linux, its highest so far elsewhere, 0 where the system does not tell."""
    try:
        return _status("VmRSS")
    except OSError:
        return _highest_resident()


def _highest_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
