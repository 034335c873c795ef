"""What every benchmark shares: the machine in words, contenders interleaved, paired ratios, memory from fresh processes, result files.

    seconds = interleave({"ours": step, "peer": other}, rounds=30)
    Paired.of(seconds["peer"], seconds["ours"])                  how many times faster, with its interval

A result file is {benchmark, machine, versions, args, rows, targets, tables}; the docs' page is generated from all of them.
Rows are flat: each value a number, a text, None, or a ratio [median, low, high]. `tables` {title: columns} says what is printed of them.

The interval of a ratio is that of the median of the per-round ratios by order statistics, which assumes no distribution: of n sorted
ratios the k-th smallest and the k-th largest, k the largest rank with a coverage of at least 95 % (n = 30: the 10th and the 21st). Fewer
than six rounds have no such rank; the interval is then their whole range, and covers less.
"""

import argparse
import ctypes
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lorakit.cli.results import VERDICTS, columns_of, figure, visible

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "lorakit")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
Row = Mapping[str, Any]
Tables = Mapping[str, Sequence[str]]


# --------------------------------------------------------------------------------------------------------------- the machine
def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, its vector units and threads, memory in bytes; on a GPU its name and memory too."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info, flags=re.MULTILINE))
    flags = fields.get("flags", "").split()
    facts: dict[str, Any] = {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
    }
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory": gpu.total_memory, "cuda": torch.version.cuda}
    return facts


def slug(facts: Mapping[str, Any]) -> str:
    """A file name's beginning for this machine: nvidia-h200, or intel-xeon-amx-2-threads."""
    if "gpu" in facts:
        return _plain(facts["gpu"])
    units = ["amx"] if "amx_bf16" in facts["flags"] else [flag for flag in facts["flags"] if flag in ("avx512f", "avx2")][-1:]
    name = re.sub(r"\(\w+\)|@.*|\b(?:CPU|Processor)\b", " ", facts["cpu"])
    return "-".join([_plain(name), *units, str(facts["threads"]), "threads" if facts["threads"] > 1 else "thread"])


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def versions() -> dict[str, str | None]:
    """Of what is compared; None where it is not installed. lorakit's own has the commit beside it, `+` where files differ from it."""
    found = {name: _version(name) for name in PACKAGES}
    return found | {"python": platform.python_version(), "commit": _commit()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------------------------ the clock
def clock(work: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call; a GPU's queue is empty before and after."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: str = "cpu") -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def interleave(contenders: Mapping[str, Callable[[], Any]], rounds: int, *, warmup: int = 1, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every contender in every round, after `warmup` rounds that are not counted.

    Every other round turns the order of the one before around, and then it rotates: nobody is always first, or behind the same neighbor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(warmup + rounds):
        turn = i // 2 % len(names)
        order = names[turn:] + names[:turn]
        for name in reversed(order) if i % 2 else order:
            taken = clock(contenders[name], device)
            if i >= warmup:
                seconds[name].append(taken)
        gc.collect()
    return seconds


@dataclass(frozen=True)
class Paired:
    """The median of per-round ratios and its interval (the module's docstring says which)."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> "Paired":
        """Round by round above / below; seconds of two contenders of one `interleave`."""
        ratios = sorted(a / b for a, b in zip(above, below, strict=True))
        k = rank(len(ratios))
        return cls(statistics.median(ratios), ratios[k], ratios[-1 - k], len(ratios))

    def as_list(self) -> list[float]:
        """[median, low, high], as in the result files."""
        return [round(value, 4) for value in (self.median, self.low, self.high)]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y ~ xᵖ by least squares: 1 is linear, 2 quadratic."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def rank(n: int, coverage: float = 0.95) -> int:
    """The index, from either end of n sorted values, of an interval that holds the median with that probability; 0: none is that wide."""
    k, outside = 0, 0.0
    while k < n / 2:
        outside += 2 * math.comb(n, k) / 2**n  # the median lies below the k-th or above the k-th from the end
        if outside > 1 - coverage:
            break
        k += 1
    return max(0, k - 1)


# ------------------------------------------------------------------------------------------------------------------ the limits
def product_rate(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, *, device: str = "cpu", repeats: int = 10) -> float:
    """Measured flops a second of x Wᵀ over these (rows, d_in, d_out): all their flops over the sum of their median times."""
    flops = seconds = 0.0
    for rows, d_in, d_out in shapes:
        x, W = torch.randn(rows, d_in, device=device, dtype=dtype), torch.randn(d_out, d_in, device=device, dtype=dtype)
        F.linear(x, W)
        seconds += statistics.median(clock(lambda x=x, W=W: F.linear(x, W), device) for _ in range(repeats))  # type: ignore[misc]
        flops += 2.0 * rows * d_in * d_out
    return flops / seconds


def bandwidth(*, device: str = "cpu", megabytes: int = 256, repeats: int = 10) -> float:
    """Measured bytes a second of a copy, read and written bytes both counted."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / statistics.median(clock(lambda: target.copy_(source), device) for _ in range(repeats))


# ---------------------------------------------------------------------------------------------------------------------- memory
def fresh(module: str, function: str, **arguments: Any) -> Any:
    """`alone`, in a process where large blocks come from the system and go back to it at once: else freed memory stays resident and hides
    the next peak."""
    return _alone(module, function, arguments, {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"})


def alone(module: str, function: str, **arguments: Any) -> Any:
    """Call `module.function(**arguments)` in a process of its own and return its value; arguments and value are JSON."""
    return _alone(module, function, arguments, {})


def _alone(module: str, function: str, arguments: dict[str, Any], env: dict[str, str]) -> Any:
    code = "import sys; from benchmarks.harness import _child; _child(*sys.argv[1:])"
    command = [sys.executable, "-c", code, module, function, json.dumps(arguments)]
    env = {**os.environ, **env, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module}.{function} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.rsplit("\n", 2)[-2])


def _child(module: str, function: str, arguments: str) -> None:
    print("\n" + json.dumps(getattr(importlib.import_module(module), function)(**json.loads(arguments))))


def peak_rise(work: Callable[[], Any], device: str = "cpu") -> int:
    """By how many bytes this process rose above what it holds now while `work` ran: resident memory, on CUDA the allocator's.

    To be called in a fresh process, after loading.
    """
    gc.collect()
    if device != "cpu":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed and is kept for reuse would hide the rise
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark becomes what is resident now
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """One entry of Linux's /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor], *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward keeps for backward: distinct storages that are no parameter's, no buffer's and none of `besides` (the batch).

    Counted are the tensors that autograd saves (by hooks) and those that custom functions stash on their ctx (by a walk over the graph).
    What neither shows, a tensor in a closure say, shows in `peak_rise` only.
    """
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    kept += _stashed(loss)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *besides)}
    sizes = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept)}
    return sum(size for where, size in sizes.items() if where not in known)


def _stashed(loss: Tensor) -> list[Tensor]:
    """Tensors among the attributes of the graph's own-made nodes."""
    seen: set[Any] = set()
    found: list[Tensor] = []
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [below for below, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found += _tensors(list(vars(node).values()))
    return found


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclasses; of modules none, they own theirs."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return _tensors(list(value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return [t for part in value for t in _tensors(part)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _tensors([getattr(value, f.name) for f in dataclasses.fields(value)])
    return []


# -------------------------------------------------------------------------------------------------------------- targets, files
@dataclass(frozen=True)
class Target:
    """A promise beside what was found. `reached` None: it was not measured in this run; `why` says why not, or why it was missed."""

    name: str
    wanted: str
    found: float | None
    interval: tuple[float, float] | None
    reached: bool | None
    why: str = ""

    @classmethod
    def at_most(cls, name: str, limit: float, found: Paired | float | None, why: str = "", *, missed: str = "") -> "Target":
        """Reached where the figure itself, not its interval, is no larger. `missed`: why it is not, if it is not."""
        return cls._of(name, f"≤ {limit:g}", found, lambda value: value <= limit, why, missed)

    @classmethod
    def at_least(cls, name: str, limit: float, found: Paired | float | None, why: str = "", *, missed: str = "") -> "Target":
        """Reached where the figure itself, not its interval, is no smaller. `missed`: why it is not, if it is not."""
        return cls._of(name, f"≥ {limit:g}", found, lambda value: value >= limit, why, missed)

    @classmethod
    def _of(cls, name: str, wanted: str, found: Paired | float | None, holds: Callable[[float], bool], why: str, missed: str) -> "Target":
        if found is None:
            return cls(name, wanted, None, None, None, why or "not measured in this run")
        value = found.median if isinstance(found, Paired) else found
        if missed and not holds(value):
            why = f"{why}: {missed}" if why else missed
        if isinstance(found, Paired):
            return cls(name, wanted, round(found.median, 4), (round(found.low, 4), round(found.high, 4)), holds(found.median), why)
        return cls(name, wanted, round(found, 4), None, holds(found), why)


def result(
    benchmark: str,
    args: argparse.Namespace | Mapping[str, Any],
    rows: Sequence[Row],
    targets: Sequence[Target],
    *,
    device: str = "cpu",
    tables: Tables | None = None,
) -> dict[str, Any]:
    """What a result file holds. `tables`: what of the rows is printed, by default one table of everything."""
    given = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
    return {
        "benchmark": benchmark,
        "machine": machine(device),
        "versions": versions(),
        "args": {key: value if isinstance(value, int | float | str | bool | None) else str(value) for key, value in given.items()},
        "rows": list(rows),
        "targets": [dataclasses.asdict(target) for target in targets],
        "tables": {title: list(columns) for title, columns in (tables or {benchmark: columns_of(rows)}).items()},
    }


def write(found: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write a result file, whole or not at all; by default under `results/`, named after the machine and the benchmark."""
    path = out or RESULTS / f"{slug(found['machine'])}-{found['benchmark'].replace('_', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def show(title: str, rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """Print rows as a table: a dash where a row lacks a column, no row that has the first column at most, no column that none has."""
    shown, kept = visible(rows, columns or columns_of(rows))
    if not kept:
        return
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(shown):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in kept:
        table.add_row(*(figure(row.get(column)) for column in shown))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def show_targets(targets: Sequence[Target]) -> None:
    """Print the targets, each with its figure, interval and verdict."""
    show("targets", [{**dataclasses.asdict(t), "reached": VERDICTS[t.reached]} for t in targets])


def arguments(description: str | None, *, rounds: int = 30) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share: --rounds, --smoke, --json FILE, --device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds a cell")
    parser.add_argument("--smoke", action="store_true", help="every part in a tiny size: that it runs, not how fast")
    parser.add_argument(
        "--json", type=Path, help="the result file; by default benchmarks/results/MACHINE-BENCHMARK.json, with --smoke none"
    )
    parser.add_argument("--device", default="cpu")
    return parser


def is_default(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Whether a run is the whole one: every argument as it comes, but for where it runs and where its results go."""
    usual = vars(parser.parse_args([]))
    return all(value == usual[name] for name, value in vars(args).items() if name not in ("json", "device"))


def publish(
    benchmark: str,
    args: argparse.Namespace,
    rows: Sequence[Row],
    targets: Sequence[Target],
    *,
    tables: Tables | None = None,
    whole: bool = True,
) -> Path | None:
    """Print tables and targets and write the result file; a smoke run, or one that is not `whole`, writes only where --json says."""
    found = result(benchmark, args, rows, targets, device=args.device, tables=tables)
    for title, columns in found["tables"].items():
        show(title, rows, columns)
    show_targets(targets)
    if args.json is None and (args.smoke or not whole):
        return None
    path = write(found, args.json)
    print(f"written: {path}")
    return path
