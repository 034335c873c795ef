"""Mixing adapters of a 7B Llama's shapes: one layer with up to 256 of them, a whole model with 16, and how time grows.

    python -m benchmarks.mixing_scale                        everything; the plot goes to docs/mixing_scale.png
    python -m benchmarks.mixing_scale --parts model,peers    some of it
    python -m benchmarks.mixing_scale --smoke                all of it in a tiny size

The adapters are random LoRAs: what mixing costs depends on shapes alone, and no base is needed.

    layer     the seven linears of a layer of width 4096. A cell that would take longer than --limit is measured on its q_proj alone
    growth    one square weight: time against number, rank and width, beside what must be computed. An exponent is of a least-squares fit to
              the three largest sizes: below them much is what an adapter costs whatever its size (to be opened, checked and named)
    model     32 layers, 16 adapters saved in bf16 and read as they are used. `beyond` is by how much the process rose above what it held
              before, less the bytes of what came out; `bound` is what one weight needs, and the largest one counts
    peers     one q_proj, beside PEFT's `add_weighted_adapter`, interleaved

What must be computed at a weight m × n from N updates of rank r, R = N r in all, cut to q (Golub and Van Loan, Matrix Computations):

    QR of d × k                                  2 k² (d − k/3), and as much again where Q is formed
    SVD of k × k with U and V                    21 k³
    Q C of a d × k Q that is not formed          4 d k q − 2 k² q
    linear                                       w s B: R m. What it makes is a copy
    svd                                          QR of both sides, their k × k core, its SVD, Q U and Q V of q columns
    ties in delta                                N ΔW twice for the threshold and once for the values, passes over their entries, a range
                                                 finder of c = q + 10 columns: 7 products with W, 5 QR, the SVD of c × c
    ties in core                                 N decompositions of rank r, both bases by QR and SVD of R × R, N times R × R entries
    ties in knots                                one such basis, N times R × n entries
    regmean                                      N Gram matrices n × n, a Cholesky decomposition, two solves a row of A

An entry that ties reads costs ENTRY operations, comparisons counted like additions. `at the products' rate` is the time that all this takes
where everything runs as fast as the machine multiplies matrices, fp64 and fp32 apart; nothing but products does.
"""

import argparse
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Paired, Row, Target
from lorakit.adapters.diagnose.plot import canvas, saved
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import keep, mix
from lorakit.adapters.plain import plain_lora
from lorakit.adapters.update import OVERSAMPLING, ROUNDS
from lorakit.cli.results import figure
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.site import Site

PNG = harness.ROOT / "docs" / "mixing_scale.png"
CUT = 16
"""The rank that is cut to."""
PASSES = 3
"""How often ties makes each ΔW: two passes find the threshold, one takes the values."""
ENTRY = 18
"""Operations an entry of an adapter: to find its bits and count them (5), to compare and select (3), to weigh, to elect a sign, to find
those that agree and their mean (10)."""
FITTED = 3
"""Points of an exponent: the largest."""
PARTIAL = " Gflop of all"
"""How the columns end that say what the flops are."""
LONG = 2.0
"""Seconds of a call that is not made again."""


# ------------------------------------------------------------------------------------------------------------------ what is mixed
class Shape(NamedTuple):
    """A Llama's."""

    hidden: int
    ffn: int
    layers: int


def linears(shape: Shape, layers: int) -> list[Site]:
    """Seven a layer."""
    d, ffn = shape.hidden, shape.ffn
    attention = [(f"self_attn.{role}_proj", d, d, role) for role in "qkvo"]
    mlp = [("mlp.gate_proj", ffn, d, "gate"), ("mlp.up_proj", ffn, d, "up"), ("mlp.down_proj", d, ffn, "down")]
    return [
        Site(f"model.layers.{i}.{name}", "linear", d_in, d_out, i, role)
        for i in range(layers)
        for name, d_out, d_in, role in attention + mlp
    ]


def adapter(sites: Sequence[Site], rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Adapter:
    """A random LoRA with s = 2."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype) / math.sqrt(shape[1])

    return plain_lora(sites, {site.name: Factors(normal(rank, site.d_in), normal(site.d_out, rank), 2.0) for site in sites}, {})


def at_one(whole: Adapter, site: Site) -> Adapter:
    """The adapter at one of its sites."""
    return replace(whole, sites=(site,), tensors={f"{site.name}.{name}": tensor for name, tensor in whole.of(site).items()})


def gram(width: int, seed: int) -> Tensor:
    """Of random inputs, fewer than it has rows: the ridge is needed."""
    X = torch.randn(256, width, generator=torch.Generator().manual_seed(seed))
    return X.T @ X / len(X)


# --------------------------------------------------------------------------------------------------------------- what must be done
class Work(NamedTuple):
    """Floating-point operations, by what does them."""

    fp64_products: float = 0.0
    fp32_products: float = 0.0
    qr: float = 0.0
    svd: float = 0.0
    entries: float = 0.0

    def plus(self, other: "Work") -> "Work":
        """Both."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def seconds(self, rates: Mapping[str, float]) -> float:
        """Where everything runs as fast as products do; entries are fp32."""
        return (self.fp64_products + self.qr + self.svd) / rates["fp64"] + (self.fp32_products + self.entries) / rates["fp32"]


class Case(NamedTuple):
    """N updates of rank r of one weight m × n."""

    m: int
    n: int
    N: int
    r: int

    @property
    def R(self) -> int:
        """Σ r; no wider than the weight in what is measured here."""
        return self.N * self.r


def qr(d: int, k: int) -> float:
    """R of a d × k matrix, and the reflections that Q is the product of."""
    return 2 * k * k * (d - k / 3)


def turned(d: int, k: int, q: int) -> float:
    """Those reflections times q columns."""
    return 4 * d * k * q - 2 * k * k * q


def svd(k: int) -> float:
    """U, σ and V of k × k."""
    return 21 * k**3


def cut(m: int, n: int, k: int, q: int) -> Work:
    """The q largest directions of B A of rank k."""
    return Work(fp64_products=2 * k**3, qr=qr(m, k) + qr(n, k) + turned(m, k, q) + turned(n, k, q), svd=svd(k))


def linear(case: Case) -> Work:
    return Work(entries=case.R * case.m)


def cut_linear(case: Case) -> Work:
    return linear(case).plus(cut(case.m, case.n, case.R, min(CUT, case.R)))


def ties_delta(case: Case) -> Work:
    """Passes over the dense updates, then a range finder."""
    m, n = case.m, case.n
    c = min(CUT + OVERSAMPLING, m, n)
    found = Work(fp32_products=(3 + 2 * ROUNDS) * 2 * m * n * c, qr=2 * ((1 + ROUNDS) * qr(m, c) + ROUNDS * qr(n, c)))
    made = Work(fp32_products=PASSES * 2 * m * n * case.R, entries=case.N * m * n * ENTRY)
    return made.plus(found).plus(cut(m, n, c, min(CUT, c)))


def ties_core(case: Case) -> Work:
    """Every update balanced, two bases, N cores, and the way back."""
    m, n, N, r, R = *case, case.R
    balanced = cut(m, n, r, r)
    bases = Work(fp64_products=2 * (m + n) * R * R, qr=2 * (qr(m, R) + qr(n, R)), svd=2 * svd(R))
    cores = Work(fp64_products=2 * (m + n) * R * R, fp32_products=PASSES * 2 * R**3, entries=N * R * R * ENTRY)
    return Work(*(N * part for part in balanced)).plus(bases).plus(cores).plus(Work(fp64_products=2 * m * R * R))


def ties_knots(case: Case) -> Work:
    """One basis, N shares."""
    m, n, N, r, R = *case, case.R
    basis = Work(fp64_products=2 * R * R * r + 2 * m * R * R, qr=2 * qr(m, R) + N * 2 * qr(n, r), svd=svd(R))
    return basis.plus(Work(fp32_products=PASSES * 2 * R * R * n, entries=N * R * n * ENTRY))


def regmean(case: Case) -> Work:
    """N Gram matrices, and the solves."""
    n = case.n
    return linear(case).plus(Work(fp64_products=n**3 / 3 + 4 * n * n * case.R, entries=4 * case.N * n * n))


# ------------------------------------------------------------------------------------------------------------ what may lie in memory
def linear_bytes(case: Case) -> float:
    """The updates in fp32; in fp64 the sum of them and a copy of it."""
    return (4 + 8 + 8) * case.R * (case.m + case.n)


def cut_bytes(case: Case) -> float:
    """The updates in fp32; in fp64 the sum, its reflections and a copy of one side while these are found; some 12 matrices R × R."""
    return (4 + 8 + 8) * case.R * (case.m + case.n) + 2 * 8 * case.R * max(case.m, case.n) + 12 * 8 * case.R**2


def core_bytes(case: Case) -> float:
    """The updates in fp32; in fp64 the balanced ones, both bases, and three matrices of one basis' size while it is found; 12 of R × R; a
    block of every adapter and what is made of it."""
    wide = (4 + 8 + 8) * case.R * (case.m + case.n) + 3 * 8 * case.R * max(case.m, case.n)
    return wide + 12 * 8 * case.R**2 + 6 * 4 * case.N * keep.BLOCK


# ------------------------------------------------------------------------------------------------------------------ ways of mixing
@dataclass(frozen=True)
class Way:
    """A mixer in a space, and what it must do at a weight."""

    mixer: str
    space: str
    work: Callable[[Case], Work]
    bytes_: Callable[[Case], float] | None = None
    """Bytes of one weight's work beyond what comes out, where that is measured."""
    counts: int = 256
    """So many adapters at most."""
    width: int = 8192
    """So wide a weight at most."""
    why: str = ""
    """Why its time does not grow as its operations, if it does not."""

    def of(self, adapters: Sequence[Adapter], stats: Sequence[Mapping[str, Tensor]] | None = None) -> Adapter:
        """The mixture."""
        return mix(adapters, self.mixer, space=self.space, stats=stats)


COPY = "it makes a copy: its time is that of memory, and of what every adapter costs whatever its size"
DECOMPOSED = "the larger a matrix, the faster its QR and SVD run for their flops"
PASSED = "passes over the entries take most of the time, at memory's pace and not that of products; they do not grow with the rank"
GRAMS = "N Gram matrices in fp64 take longer to make than to multiply by, and do not grow with the rank"
WAYS = {
    "linear": Way("linear", "delta", linear, linear_bytes, why=COPY),
    f"svd, rank {CUT}": Way("linear", f"delta+svd:{CUT}", cut_linear, cut_bytes, why=DECOMPOSED),
    f"ties in delta, rank {CUT}": Way("ties", f"delta+svd:{CUT}", ties_delta, why=PASSED),
    "ties in core": Way("ties", "core", ties_core, core_bytes, why=DECOMPOSED),
    "ties in knots": Way("ties", "knots", ties_knots, why=DECOMPOSED),
    "regmean": Way("regmean", "delta", regmean, counts=16, width=4096, why=GRAMS),
}


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    shape: Shape = Shape(4096, 11008, 32)
    rank: int = 16
    counts: tuple[int, ...] = (2, 4, 16, 64, 256)
    base: Case = Case(4096, 4096, 16, 16)
    """From which one side of `growth` departs at a time."""
    adapters: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64)
    widths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    in_model: int = 16
    peers: tuple[int, ...] = (2, 16)


SMOKE = Sizes(Shape(64, 96, 2), 2, (2, 3), Case(64, 64, 2, 2), (2, 3), (2, 3), (48, 64), 3, (2,))


def machine_row(smoke: bool) -> tuple[dict[str, float], Row]:
    """(flops a second of products, the row that says so)."""
    shapes = [(64, 64, 64)] if smoke else [(2048, 4096, 512), (4096, 4096, 256)]
    rates = {name: harness.product_rate(shapes, dtype) for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32))}
    return rates, named("products", {"unit": "Gflop/s"} | {name: rate / 1e9 for name, rate in rates.items()})


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of every call. One that is not long is made once more before, and that is not counted."""
    first = harness.clock(work)
    return [first] if first > LONG else [harness.clock(work) for _ in range(rounds)]


def figures(seconds: Sequence[float], work: Work, rates: Mapping[str, float]) -> dict[str, Any]:
    """A cell's columns."""
    s, parts = statistics.median(seconds), {name: value / 1e9 for name, value in work._asdict().items() if value}
    limit = work.seconds(rates)
    return {
        "calls": len(seconds), "s": s, "Gflop": sum(work) / 1e9, "Gflop/s": sum(work) / 1e9 / s, "at the products' rate s": limit,
        "times that": s / limit,
    } | {f"{name.replace('_', ' ')}{PARTIAL}": value for name, value in parts.items()}  # fmt: skip


def named(part: str, row: Mapping[str, Any]) -> Row:
    """The row with its part before every name: a table prints all rows that have one of its columns."""
    return {part if i == 0 else f"{part} {key}": value for i, (key, value) in enumerate(row.items())}


# ----------------------------------------------------------------------------------------------------------------------- one layer
def layer(sizes: Sizes, rounds: int, limit: float, rates: Mapping[str, float]) -> Iterator[Row]:
    """A row for every way and number."""
    sites = linears(sizes.shape, 1)
    adapters = [adapter(sites, sizes.rank, seed, torch.bfloat16) for seed in range(max(sizes.counts))]
    alone = [at_one(one, sites[0]) for one in adapters]
    for name, way in WAYS.items():
        for count in (n for n in sizes.counts if n <= way.counts):
            works = [way.work(Case(site.d_out, site.d_in, count, sizes.rank)) for site in sites]
            stats = stats_of(way, sites[0], count)
            seconds = timed(partial(way.of, alone[:count], stats), rounds)
            row: dict[str, Any] = {"way": name, "adapters": count, "of": "q_proj"}
            expected = statistics.median(seconds) * sum(work.seconds(rates) for work in works) / works[0].seconds(rates)
            if stats is not None:
                row["note"] = "the Gram matrices of all seven weights would take most of the memory"
            elif expected > limit:
                row["note"] = f"all seven would take some {expected:.0f} s"
            else:
                row["of"], seconds = "7 linears", timed(partial(way.of, adapters[:count]), rounds)
            done = works[0] if row["of"] == "q_proj" else Work(*map(sum, zip(*works, strict=True)))
            yield named("layer", row | figures(seconds, done, rates))


def stats_of(way: Way, site: Site, count: int) -> list[Mapping[str, Tensor]] | None:
    """What regmean needs of each task, at one weight."""
    return [{site.name: gram(site.d_in, i)} for i in range(count)] if way.mixer == "regmean" else None


# -------------------------------------------------------------------------------------------------------------------------- growth
AXES = ("adapters", "rank", "width")


def cases(sizes: Sizes, way: Way, axis: str) -> list[tuple[int, Case]]:
    """(where on the axis, the case)."""
    made = {
        "adapters": [(n, sizes.base._replace(N=n)) for n in sizes.adapters if n <= way.counts],
        "rank": [(r, sizes.base._replace(r=r)) for r in sizes.ranks],
        "width": [(d, sizes.base._replace(m=d, n=d)) for d in sizes.widths if d <= way.width],
    }
    return made[axis]


def growth(sizes: Sizes, rounds: int, rates: Mapping[str, float]) -> Iterator[Row]:
    """A row for every point, then one of exponents for each way and axis."""
    exponents: list[Row] = []
    for name, way in WAYS.items():
        known: dict[Case, list[float]] = {}
        for axis in AXES:
            points: list[dict[str, Any]] = []
            for at, case in cases(sizes, way, axis):
                if case not in known:
                    known[case] = timed(_one_site(way, case), rounds)
                points.append({"way": name, "along": axis, "at": at} | figures(known[case], way.work(case), rates))
            yield from (named("growth", point) for point in points)
            last = points[-FITTED:]
            time, flops = (harness.exponent([p["at"] for p in last], [p[key] for p in last]) for key in ("s", "Gflop"))
            row = {"way": name, "in": axis, "of time": time, "of flops": flops, "apart": abs(time - flops)}
            exponents.append(named("exponents", row))
    yield from exponents


def _one_site(way: Way, case: Case) -> Callable[[], Adapter]:
    site = Site("model.layers.0.self_attn.q_proj", "linear", case.n, case.m, 0, "q")
    return partial(way.of, [adapter([site], case.r, seed) for seed in range(case.N)], stats_of(way, site, case.N))


def plot(rows: Sequence[Row], sizes: Sizes, png: Path) -> Path:
    """Seconds as dots, and as lines what must be computed, scaled to them where the axes meet: at the case that all three depart from."""
    drawn = canvas(13.5, 4.8)
    meet = {"adapters": sizes.base.N, "rank": sizes.base.r, "width": sizes.base.n}
    for axes, axis in zip(drawn.subplots(1, len(AXES), sharey=True), AXES, strict=True):
        for i, name in enumerate(WAYS):
            points = [row for row in rows if (row.get("growth"), row.get("growth along")) == (name, axis)]
            x, s, flops = ([row[f"growth {key}"] for row in points] for key in ("at", "s", "Gflop"))
            here = x.index(meet[axis])
            axes.plot(x, s, "o", color=f"C{i}", label=name)
            axes.plot(x, [value * s[here] / flops[here] for value in flops], "-", color=f"C{i}", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.set_xticks(sorted({row["growth at"] for row in rows if row.get("growth along") == axis}), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:.0f}")
    drawn.axes[0].set_ylabel("seconds")
    drawn.axes[0].legend(fontsize=8)
    base = sizes.base
    drawn.suptitle(f"dots: time of mixing {base.N} adapters of rank {base.r}, {base.m} × {base.n}, one of these changed; lines: flops")
    return saved(drawn, png)


# --------------------------------------------------------------------------------------------------------------------- whole model
def model(sizes: Sizes) -> Iterator[Row]:
    """A row for each way whose memory has a formula."""
    sites = linears(sizes.shape, sizes.shape.layers)
    dense = max(4 * site.d_out * site.d_in for site in sites)
    with tempfile.TemporaryDirectory() as place:
        folders = [str(save_adapter(adapter(sites, sizes.rank, i, torch.bfloat16), Path(place) / f"a{i}")) for i in range(sizes.in_model)]
        size = sum(path.stat().st_size for path in Path(place).rglob("*.safetensors"))
        for name, way in WAYS.items():
            if way.bytes_ is not None:
                found = harness.fresh("benchmarks.mixing_scale", "whole", way=name, folders=folders)
                bound = max(way.bytes_(Case(site.d_out, site.d_in, sizes.in_model, sizes.rank)) for site in sites)
                beyond = found["rise"] - found["result"]
                row = {
                    "way": name, "layers": sizes.shape.layers, "adapters": sizes.in_model, "s": found["s"], "files MB": size / 1e6,
                    "result MB": found["result"] / 1e6, "rise MB": found["rise"] / 1e6, "beyond MB": beyond / 1e6, "bound MB": bound / 1e6,
                    "one dense fp32 weight MB": dense / 1e6, "beyond / bound": beyond / bound,
                }  # fmt: skip
                yield named("model", row)


def whole(way: str, folders: Sequence[str]) -> dict[str, float]:
    """Called in a fresh process: seconds, bytes that the process rose by, bytes of what came out."""
    WAYS[way].of([adapter(linears(Shape(512, 512, 1), 1), 16, i) for i in range(2)])  # code that is read for the first time is no one's
    adapters = [load_adapter(folder, lazily=True) for folder in folders]
    made: list[Adapter] = []
    seconds: list[float] = []
    rise = harness.peak_rise(lambda: seconds.append(harness.clock(lambda: made.append(WAYS[way].of(adapters)))))
    return {"s": seconds[0], "rise": rise, "result": sum(tensor.nbytes for tensor in made[0].tensors.values())}


# --------------------------------------------------------------------------------------------------------------------------- peers
class Attention(nn.Module):
    """All that PEFT needs of a model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)


class Pair(NamedTuple):
    """A call of `add_weighted_adapter` and ours that makes the same, or as near to it as ours comes."""

    theirs: Mapping[str, Any]
    ours: Callable[[Sequence[Adapter]], Adapter]
    slow: bool = False
    """Decomposes a whole ΔW."""
    ones: bool = False
    """With weights 1, not 1/N."""
    note: str = ""


PAIRS = {
    "cat": Pair({"combination_type": "cat"}, partial(mix)),
    "linear": Pair({"combination_type": "linear"}, partial(mix, space="factor"), note="both with cross terms, no Σ w ΔW"),
    "ties": Pair(
        {"combination_type": "ties", "density": 0.2},
        partial(mix, how="ties", space="factor", density=0.2),
        ones=True,
        note="both A and B apart",
    ),
    "svd": Pair({"combination_type": "svd"}, partial(mix, how="svd"), slow=True, note="svd_full_matrices=True, the default"),
    "svd, thin": Pair({"combination_type": "svd", "svd_full_matrices": False}, partial(mix, how="svd"), slow=True),
    "ties_svd": Pair(
        {"combination_type": "ties_svd", "svd_full_matrices": False, "density": 0.2},
        partial(mix, how="ties", space=f"delta+svd:{CUT}", density=0.2),
        slow=True,
        ones=True,
        note="svd_full_matrices=False",
    ),
}


def peers(sizes: Sizes, rounds: int) -> Iterator[Row]:
    """A row for every pair and number. What decomposes ΔW whole is called once."""
    site = linears(sizes.shape, 1)[0]
    for count in sizes.peers:
        adapters = [adapter([site], sizes.rank, seed) for seed in range(count)]
        theirs = in_peft(adapters, site, sizes.rank)
        for name, pair in PAIRS.items():
            weights = [1.0 if pair.ones else 1 / count] * count
            seconds: dict[str, list[float]] = {"peft": [], "lorakit": []}
            work = {
                "peft": partial(theirs.add_weighted_adapter, [f"a{i}" for i in range(count)], weights, "mixed", **pair.theirs),
                "lorakit": partial(pair.ours, adapters),
            }
            for i in range(1 if pair.slow else 1 + rounds):
                for who in work if i % 2 else reversed(work):
                    taken = harness.clock(work[who])
                    if i or pair.slow:
                        seconds[who].append(taken)
                theirs.delete_adapter("mixed")
            row: dict[str, Any] = {"call": name, "adapters": count, "rounds": len(seconds["peft"])}
            row |= {f"{who} s": statistics.median(taken) for who, taken in seconds.items()}
            row |= {"speedup over peft": Paired.of(seconds["peft"], seconds["lorakit"]).as_list(), "note": pair.note}
            yield named("peers", row)


def in_peft(adapters: Sequence[Adapter], site: Site, rank: int) -> Any:
    """The same adapters, a0, a1, …, in PEFT's hands."""
    from peft import LoraConfig, get_peft_model  # no other part needs it, nor a fresh process

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"])
    made: Any = get_peft_model(Attention(site.d_in), config, adapter_name="a0")
    for i in range(1, len(adapters)):
        made.add_adapter(f"a{i}", config)
    module = made.base_model.model.q_proj
    with torch.no_grad():
        for i, one in enumerate(adapters):
            module.lora_A[f"a{i}"].weight.copy_(one.tensors[f"{site.name}.A"])
            module.lora_B[f"a{i}"].weight.copy_(one.tensors[f"{site.name}.B"])
    return made


# -------------------------------------------------------------------------------------------------------------------- the whole run
def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Of memory, and of growth: for each way the axis where time and flops are farthest apart."""
    found = []
    for name, way in WAYS.items():
        if way.bytes_ is not None:
            ratio = next((row["model beyond / bound"] for row in rows if row.get("model") == name), None)
            found.append(Target.at_most(f"whole model, {name}: memory beyond the result / that of one weight", 1.0, ratio))
    for name, way in WAYS.items():
        worst = max((row for row in rows if row.get("exponents") == name), key=lambda row: row["exponents apart"], default=None)
        value, where = (None, "") if worst is None else (worst["exponents apart"], f"in {worst['exponents in']}")
        title = f"growth of {name}: exponents of time and of flops apart"
        found.append(Target.at_most(title, 0.15, value, where, missed=way.why))
    return found


TABLES = {
    "products": "products",
    "one layer of a 7B Llama": "layer",
    "growth": "growth",
    "exponents of growth": "exponents",
    "a whole 7B Llama": "model",
    "beside PEFT, one q_proj": "peers",
}


def tables(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Every table's columns are those of the rows that have its first, without the shares of the flops."""
    found = {}
    for title, first in TABLES.items():
        keys = dict.fromkeys(key for row in rows if first in row for key in row)
        found[title] = [key for key in keys if not key.endswith(PARTIAL)]
    return {title: columns for title, columns in found.items() if columns}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, publish."""
    parser = harness.arguments(__doc__, rounds=5)
    parser.add_argument("--parts", default="layer,growth,model,peers", help="some of them, separated by commas")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds of a cell of `layer`; what takes longer is measured on one weight"
    )
    parser.add_argument("--png", type=Path, help="the plot; by default docs/mixing_scale.png, of a run that is not the whole one none")
    args = parser.parse_args(argv)
    whole_run = harness.is_default(parser, args)
    rows, sizes = run(args)
    png = args.png or (PNG if whole_run else None)
    if png is not None:
        print(f"drawn: {plot(rows, sizes, png)}")
    harness.publish("mixing_scale", args, rows, targets_of(rows), tables=tables(rows), whole=whole_run)


def run(args: argparse.Namespace) -> tuple[list[Row], Sizes]:
    """(the rows of all parts, how large they were)."""
    warnings.simplefilter("ignore")  # PEFT's
    sizes, rounds = (SMOKE, 2) if args.smoke else (Sizes(), args.rounds)
    rates, first = machine_row(args.smoke)
    made = {
        "layer": lambda: layer(sizes, rounds, args.limit, rates),
        "growth": lambda: growth(sizes, rounds, rates),
        "model": lambda: model(sizes),
        "peers": lambda: peers(sizes, rounds),
    }
    rows = [first]
    for part in args.parts.split(","):
        for row in made[part]():
            print({key: figure(value) for key, value in row.items()}, flush=True)
            rows.append(row)
    return rows, sizes


if __name__ == "__main__":
    main()
