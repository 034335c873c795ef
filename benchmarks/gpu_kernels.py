"""The Triton kernels of ops/triton on a GPU: each beside torch's own operations (cuBLAS) and beside the roofline, in one run.

    python -m benchmarks.gpu_kernels                         everything; the result file goes to benchmarks/results/
    python -m benchmarks.gpu_kernels --kernels down outer    some kernels
    python -m benchmarks.gpu_kernels --smoke                 all of them in a tiny size

First every kernel is compared with a product in fp64 of the same masks (made on the CPU), and all its configurations with each other, bit
for bit: what tuning chooses may not change a result. Then both contenders are recorded as CUDA graphs, so that no launch from Python is
timed, and replayed in turn, each with a cold L2. The limit of a kernel is the larger of its bytes over the bandwidth and its flops over the
product rate, both measured in this run; `of limit` is that over its time. `layer` is one adapted layer's forward beside the frozen one.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Paired, Row, Target
from lorakit.cli.results import figure
from lorakit.ops import cpu, triton
from lorakit.ops.mask import Mask
from lorakit.parts.bases import nf4
from lorakit.parts.bases.packed import Layout, Packed
from lorakit.parts.bases.scales import dequantize_scales, dynamic_map

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
"""(d_in, d_out) of a model of 8 billion parameters."""
SMALL = ((256, 384),)
RANKS = (16, 64)
DROPOUT = 0.05
CLOSE = 1e-2
"""Of bf16 results, relative to fp64."""


@dataclass(frozen=True)
class Cell:
    """One kernel at one shape: what is timed, what it is compared with, and what it cannot do without."""

    kernel: str
    shape: tuple[int, ...]
    r: int
    dropout: float
    ours: Callable[[], Tensor]
    torch: Callable[[], Tensor]
    bytes: int
    flops: int
    wanted: Callable[[], Tensor]
    tuned: Any = None
    frozen: Callable[[], Tensor] | None = None
    exact: bool = False


# -------------------------------------------------------------------------------------------------------------------- the cells
def cells(tokens: int, shapes: tuple[tuple[int, int], ...], device: str) -> Iterator[Cell]:
    """All of them, made one after the other; the tensors of one are gone when the next one is asked for."""
    for d_in, d_out in shapes:
        for r in RANKS:
            for p in (0.0, DROPOUT):
                yield from _products(tokens, d_in, d_out, r, p, device)
            yield from _linears(tokens, d_in, d_out, r, device)
        yield _nf4(d_in, d_out, device)


def _products(n: int, k: int, m: int, r: int, p: float, device: str) -> Iterator[Cell]:
    """down, finish_ and outer."""
    from lorakit.ops.triton import products

    x, A, B, u, dz = (_normal(*shape, device=device) for shape in ((n, k), (r, k), (m, r), (n, r), (n, r)))
    mask = Mask(torch.tensor([0, 1]), torch.tensor(2), p) if p else None
    flops = 2 * n * r

    def kept(rows: int, width: int) -> Tensor:
        on_cpu = torch.empty(rows, width)
        return torch.ones(rows, width, device=device) if mask is None else mask.keep(on_cpu).to(device)

    yield Cell("down", (n, k), r, p, lambda: products.down(x, A, mask), lambda: F.linear(F.dropout(x, p) if p else x, A),
               x.nbytes + A.nbytes + u.nbytes, flops * k, lambda: (x.double() * kept(n, k)) @ A.double().T, products._down)  # fmt: skip
    yield Cell("outer", (n, k), r, p, lambda: products.outer(dz, x, mask), lambda: dz.T @ (F.dropout(x, p) if p else x),
               x.nbytes + A.nbytes + u.nbytes, flops * k, lambda: dz.double().T @ (x.double() * kept(n, k)), products._outer)  # fmt: skip
    y = _normal(n, m, device=device)
    gain = 1 + 0.01 * _normal(m, device=device)  # near one: a graph is replayed on what it wrote before
    before = y.clone()
    masks = "" if p else ", gain and bias"
    rows = {} if p else {"gain": gain, "bias": gain}

    def composed() -> Tensor:
        if p:
            return y.add_(F.dropout(F.linear(u, B), p))
        return cpu.finish_(y, u, B, **rows)

    def wanted() -> Tensor:
        out = before.double() + kept(n, m) * (u.double() @ B.double().T)
        return out if p else gain.double() + gain.double() * (out - gain.double())

    def ours() -> Tensor:
        return products.finish_(y, u, B, mask=mask, **rows)

    least = 2 * y.nbytes + u.nbytes + B.nbytes
    yield Cell("finish" + masks, (n, m), r, p, lambda: _again(y, before, ours), composed, least, flops * m, wanted, products._finish)
    if not p:
        yield Cell("finish", (n, m), r, p, lambda: _again(y, before, lambda: products.finish_(y, u, B)), lambda: y.addmm_(u, B.T), least,
                   flops * m, lambda: before.double() + u.double() @ B.double().T, products._finish)  # fmt: skip


def _linears(n: int, k: int, m: int, r: int, device: str) -> Iterator[Cell]:
    """linear in both directions, and the layer."""
    from lorakit.ops.triton import linear, products

    x, W, A, B, u, dy = (_normal(*shape, device=device) for shape in ((n, k), (m, k), (r, k), (m, r), (n, r), (n, m)))
    flops = 2 * n * m * (k + r)
    least = x.nbytes + W.nbytes + dy.nbytes
    fused = linear.linear
    yield Cell("linear", (n, k, m), r, 0.0, lambda: fused(x, W, u, B), lambda: F.linear(x, W).addmm_(u, B.T), least, flops,
               lambda: x.double() @ W.double().T + u.double() @ B.double().T, linear._linear, lambda: F.linear(x, W))  # fmt: skip
    yield Cell("linear, backward", (n, m, k), r, 0.0, lambda: fused(dy, W.T, u, A.T), lambda: (dy @ W).addmm_(u, A), least, flops,
               lambda: dy.double() @ W.double() + u.double() @ A.double(), linear._linear, lambda: dy @ W)  # fmt: skip

    def layer() -> Tensor:
        return products.finish_(F.linear(x, W), products.down(x, A), B)

    def composed() -> Tensor:
        return F.linear(x, W) + F.linear(F.linear(x, A), B) * 2.0

    yield Cell("layer", (n, k, m), r, 0.0, layer, composed, least, flops + 2 * n * k * r,
               lambda: x.double() @ W.double().T + (x.double() @ A.double().T).bfloat16().double() @ B.double().T, None,
               lambda: F.linear(x, W))  # fmt: skip


def _nf4(k: int, m: int, device: str) -> Cell:
    """The decoding of a whole weight."""
    from lorakit.ops.triton.nf4 import _decode, decode

    layout = Layout(m, k, torch.bfloat16)
    on_cpu = Packed.of(_normal(m, k, device=device).float().cpu(), layout)
    packed = Packed(*(t.to(device) for t in on_cpu if t is not None))
    assert packed.nested is not None
    nested, where = packed.nested, packed.codes.device
    levels, table = torch.tensor(nf4.LEVELS, device=device), dynamic_map(where)

    def ours() -> Tensor:
        return decode(*packed, levels, table, start=0, n=layout.numel, blocksize=64, dtype=torch.bfloat16)

    def composed() -> Tensor:
        scales = dequantize_scales(packed.scales, nested[:-1], nested[-1])
        return nf4.rescaled(levels[nf4.unpack(packed.codes, layout.numel).int()], scales, 64).to(torch.bfloat16)

    least = packed.nbytes() + 2 * layout.numel
    return Cell("nf4", (m, k), 0, 0.0, ours, composed, least, 0, lambda: on_cpu.rows(layout, 0, m).view(-1).to(device), _decode, exact=True)


def _normal(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def _again(y: Tensor, before: Tensor, work: Callable[[], Tensor]) -> Tensor:
    """An operation in place, from the same y as the first time while it is checked; a graph records the operation alone."""
    if not torch.cuda.is_current_stream_capturing():
        y.copy_(before)
    return work()


# ------------------------------------------------------------------------------------------------------------------ right first
def error(cell: Cell) -> float:
    """Of our result, relative to fp64. Raises AssertionError where it is too large, or where two configurations differ by a bit."""
    wanted = cell.wanted()
    found = cell.ours().clone()
    if cell.exact:
        assert torch.equal(found, wanted), f"{cell.kernel} {cell.shape}: the bits are not those of the CPU"
    off = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert off < CLOSE, f"{cell.kernel} {cell.shape}, r {cell.r}, dropout {cell.dropout}: off by {off:.2g}"
    del wanted
    if cell.tuned is not None:
        tried = cell.tuned.configs
        for config in tried:
            cell.tuned.configs = [config]
            assert torch.equal(cell.ours(), found), f"{cell.kernel} {cell.shape}: {config} gives other bits"
        cell.tuned.configs = tried
    return off


# -------------------------------------------------------------------------------------------------------------------- the clock
def recorded(work: Callable[[], Tensor]) -> Callable[[], None]:
    """The work as a CUDA graph, after two runs beside it."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        work()
        work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def interleave(contenders: dict[str, Callable[[], None]], rounds: int, cache: Tensor) -> dict[str, list[float]]:
    """Seconds of every contender in every round by the GPU's own clock, the order turned around in every other one; `cache` is written
    before each, so that nothing it reads is in the L2."""
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in contenders if i % 2 else reversed(contenders):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.zero_()
            began.record()
            contenders[name]()
            ended.record()
            events[name].append((began, ended))
    torch.cuda.synchronize()
    return {name: [began.elapsed_time(ended) / 1000 for began, ended in pairs] for name, pairs in events.items()}


def measured(cell: Cell, rounds: int, bandwidth: float, rate: float, cache: Tensor) -> dict[str, Any]:
    """One row."""
    off = error(cell)
    contenders = {"ours": recorded(cell.ours), "torch": recorded(cell.torch)}
    if cell.frozen is not None:
        contenders["frozen"] = recorded(cell.frozen)
    seconds = interleave(contenders, rounds, cache)
    ours = statistics.median(seconds["ours"])
    limit = max(cell.bytes / bandwidth, cell.flops / rate)
    return {
        "kernel": cell.kernel,
        "shape": " × ".join(map(str, cell.shape)),
        "r": cell.r,
        "dropout": cell.dropout,
        "µs": round(ours * 1e6, 2),
        "torch µs": round(statistics.median(seconds["torch"]) * 1e6, 2),
        "limit µs": round(limit * 1e6, 2),
        "of limit": round(limit / ours, 3),
        "faster": Paired.of(seconds["torch"], seconds["ours"]).as_list(),
        "over frozen": Paired.of(seconds["ours"], seconds["frozen"]).as_list() if "frozen" in seconds else None,
        "error": off,
        "config": "" if cell.tuned is None else str(cell.tuned.best_config),
    }


# ------------------------------------------------------------------------------------------------------------------ the targets
def targets(rows: list[Row]) -> list[Target]:
    """The worst cell of each promise."""
    found = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == kernel]
        slowest = min(mine, key=lambda row: row["faster"][0])
        found.append(_worst(Target.at_least(f"{kernel}: times as fast as torch, worst cell", 1.0, slowest["faster"][0]), slowest["faster"]))
    layers = [row for row in rows if row["kernel"] == "layer" and row["r"] == 16]
    if layers:
        worst = max(layers, key=lambda row: row["over frozen"][0])
        found.append(
            _worst(Target.at_most("layer, r 16: over the frozen layer, worst cell", 1.07, worst["over frozen"][0]), worst["over frozen"])
        )
    return found


def _worst(target: Target, figures: list[float]) -> Target:
    """The target with its interval."""
    return Target(target.name, target.wanted, target.found, (figures[1], figures[2]), target.reached, target.why)


def main() -> None:
    parser = harness.arguments(__doc__, rounds=100)
    parser.set_defaults(device="cuda")
    parser.add_argument("--kernels", nargs="*", default=[], help="down outer finish linear layer nf4; by default all")
    parser.add_argument("--tokens", type=int, default=8192, help="rows of x")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_kernels needs a CUDA device; found none. On a CPU the kernels are tested by: pytest tests/ops/test_triton.py")
    os.environ.setdefault("LORAKIT_TRITON", "1")
    if not triton.available(torch.device(args.device), torch.bfloat16):
        raise SystemExit(f"gpu_kernels needs Triton and a CUDA device; --device is {args.device}: pip install triton")
    publish(args)


def publish(args: argparse.Namespace) -> None:
    """All rows, printed as they come."""
    torch.manual_seed(0)
    cache = torch.empty(512 * 2**20, dtype=torch.uint8, device=args.device)
    size = 1024 if args.smoke else 8192
    bandwidth = harness.bandwidth(device=args.device, megabytes=64 if args.smoke else 4096)
    rate = harness.product_rate([(size, size, size)], torch.bfloat16, device=args.device)
    print(f"{harness.machine(args.device)['gpu']}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s in bf16")
    rows: list[Row] = []
    for cell in cells(256 if args.smoke else args.tokens, SMALL if args.smoke else SHAPES, args.device):
        if not args.kernels or cell.kernel.split(",")[0] in args.kernels:
            rows.append(measured(cell, 6 if args.smoke else args.rounds, bandwidth, rate, cache))
            print(*(f"{key} {figure(value)}" for key, value in rows[-1].items()), sep=" · ", flush=True)
    harness.show("kernels", [{key: value for key, value in row.items() if key != "config"} for row in rows])
    harness.publish("gpu_kernels", args, rows, targets(rows))


if __name__ == "__main__":
    main()
