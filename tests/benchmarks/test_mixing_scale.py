"""What mixing_scale.py states beside its times: its operations are those that torch is asked for, its pairs with PEFT make the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from benchmarks import mixing_scale as bench
from benchmarks.mixing_scale import PAIRS, SMOKE, WAYS, Case, Way
from lorakit.adapters.io import save_adapter
from lorakit.core.site import Site

RATES = {"fp64": 1e9, "fp32": 2e9}
CASE = Case(80, 72, 3, 7)  # wider than what is cut to, and than the columns of the range finder
SITE = Site("layers.0.q_proj", "linear", CASE.n, CASE.m, 0, "q")


class Counted(TorchDispatchMode):
    """Operations of everything that multiplies or decomposes matrices, by kind; what each call costs is written down in the benchmark."""

    def __init__(self) -> None:
        super().__init__()
        self.found = dict.fromkeys(("fp64_products", "fp32_products", "qr", "svd"), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in COSTS:
            kind, cost = COSTS[name](*args)
            self.found[kind] += cost
        return func(*args, **(kwargs or {}))


def product(left: Tensor, right: Tensor) -> tuple[str, float]:
    return ("fp64_products" if left.dtype == torch.float64 else "fp32_products"), 2.0 * left.shape[0] * left.shape[1] * right.shape[1]


COSTS = {
    "mm": product,
    "linalg_qr": lambda M, mode="reduced": ("qr", (2 if mode == "reduced" else 1) * bench.qr(*M.shape)),
    "geqrf": lambda M: ("qr", bench.qr(*M.shape)),
    "ormqr": lambda M, tau, C, *_: ("qr", bench.turned(*M.shape, C.shape[1])),
    "_linalg_svd": lambda M, *_: ("svd", bench.svd(len(M))),
    "linalg_cholesky_ex": lambda M, *_: ("fp64_products", len(M) ** 3 / 3),
    "cholesky_solve": lambda C, L: ("fp64_products", 2.0 * len(L) ** 2 * C.shape[1]),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_operations_stated_are_those_that_are_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, stated = WAYS[name], WAYS[name].work(CASE)
    monkeypatch.setattr("lorakit.adapters.mix.work.norm", lambda f: 0.0)  # for the record alone
    adapters, stats = [bench.adapter([SITE], CASE.r, i) for i in range(CASE.N)], bench.stats_of(way, SITE, CASE.N)
    with Counted() as counted:
        way.of(adapters, stats)
    for kind, operations in counted.found.items():
        assert operations == pytest.approx(getattr(stated, kind)), kind


@pytest.mark.parametrize("axis", bench.AXES)
@pytest.mark.parametrize("name", WAYS)
def test_one_side_changes_along_an_axis_and_no_update_is_wider_than_its_weight(name: str, axis: str) -> None:
    sizes = bench.Sizes()
    points = bench.cases(sizes, WAYS[name], axis)
    assert len(points) >= 4
    assert all(min(case.m, case.n) >= case.R for _, case in points)
    assert sum(case == sizes.base for _, case in points) == 1, "there the plot's lines meet the dots"
    places = {"adapters": (2,), "rank": (3,), "width": (0, 1)}[axis]
    for at, case in points:
        assert all(case[i] == (at if i in places else sizes.base[i]) for i in range(4))


def test_the_textbooks_counts() -> None:
    """Of a square matrix: 4/3 k³ for R, 2 k³ to apply Q to another. Of a tall one, 2 d k² and 4 d k q."""
    assert bench.qr(30, 30) == pytest.approx(4 / 3 * 30**3)
    assert bench.turned(30, 30, 30) == pytest.approx(2 * 30**3)
    assert bench.qr(10**6, 3) == pytest.approx(2 * 10**6 * 9, rel=1e-5)
    assert bench.turned(10**6, 3, 2) == pytest.approx(4 * 10**6 * 6, rel=1e-5)
    assert bench.svd(10) == 21_000


def test_the_operations_on_entries() -> None:
    """No call says them; a sum weighs what is not read twice, and ties reads the weight, the core, or the shares of every adapter."""
    m, n, N, r = CASE
    assert bench.linear(CASE).entries == N * r * m
    assert bench.ties_delta(CASE).entries == bench.ENTRY * N * m * n
    assert bench.ties_core(CASE).entries == bench.ENTRY * N * (N * r) ** 2
    assert bench.ties_knots(CASE).entries == bench.ENTRY * N * (N * r) * n


def test_exponents_are_of_the_largest_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WAYS", {"linear": WAYS["linear"]})
    monkeypatch.setattr(bench, "_one_site", lambda way, case: case)
    monkeypatch.setattr(bench, "timed", lambda case, rounds: [99.0 if min(case) < 5 else case.N**2 * case.r * case.n**0.5])
    rows = list(bench.growth(bench.Sizes(), 1, RATES))
    found = {row["exponents in"]: (row["exponents of time"], row["exponents of flops"]) for row in rows if "exponents" in row}
    for axis, time in {"adapters": 2.0, "rank": 1.0, "width": 0.5}.items():
        assert found[axis] == pytest.approx((time, 1.0))
    assert [row["growth at"] for row in rows if row.get("growth along") == "rank"] == [4, 8, 16, 32, 64]


def test_the_exponent_is_that_of_the_law() -> None:
    assert bench.harness.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_work_at_the_products_rates() -> None:
    work = bench.Work(fp64_products=1e9, fp32_products=2e9, qr=2e9, svd=3e9, entries=4e9)
    assert work.seconds(RATES) == pytest.approx(6 + 3)
    row = bench.figures([3.0, 30.0, 18.0], work, RATES)
    assert (row["s"], row["Gflop"], row["Gflop/s"], row["times that"]) == pytest.approx((18.0, 12.0, 12 / 18, 2.0))


@pytest.mark.parametrize(("limit", "of"), [(math.inf, "7 linears"), (0.0, "q_proj")])
def test_a_cell_that_takes_long_is_measured_on_one_weight_and_says_so(limit: float, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way = WAYS["linear"]
    monkeypatch.setattr(bench, "WAYS", {"linear": way})
    rows = list(bench.layer(SMOKE, 1, limit, RATES))
    assert [row["layer adapters"] for row in rows] == list(SMOKE.counts)
    assert all(row["layer of"] == of for row in rows)
    assert all(("layer note" in row) == (of == "q_proj") for row in rows)
    sites = bench.linears(SMOKE.shape, 1)[: 7 if of == "7 linears" else 1]
    wanted = sum(sum(way.work(Case(site.d_out, site.d_in, SMOKE.counts[0], SMOKE.rank))) for site in sites)
    assert rows[0]["layer Gflop"] == pytest.approx(wanted / 1e9)


def test_regmean_is_measured_on_one_weight_whatever_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WAYS", {"regmean": WAYS["regmean"]})
    assert {row["layer of"] for row in bench.layer(SMOKE, 1, math.inf, RATES)} == {"q_proj"}


def test_the_shapes_are_a_7b_llamas() -> None:
    shape = bench.Sizes().shape
    sites = bench.linears(shape, shape.layers)
    assert len({site.name for site in sites}) == len(sites) == 224
    assert sum(site.d_in * site.d_out for site in sites) == 6_476_005_376


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of every second adapter
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_makes_the_same(name: str) -> None:
    """ties_svd nearly: our cut to a rank is a range finder's, of a spectrum that hardly falls."""
    pair, rank, site = PAIRS[name], 16, bench.linears(SMOKE.shape, 1)[0]
    adapters = [bench.adapter([site], rank, seed) for seed in range(2)]
    theirs = bench.in_peft(adapters, site, rank)
    theirs.add_weighted_adapter(["a0", "a1"], [1.0 if pair.ones else 0.5] * 2, "mixed", **pair.theirs)
    wanted = theirs.base_model.model.q_proj.get_delta_weight("mixed")
    made = pair.ours(adapters).factors()[site.name]
    assert float((made.s * made.B @ made.A - wanted).norm() / wanted.norm()) < (0.3 if name == "ties_svd" else 1e-5)


def test_the_targets_are_the_farthest_axis_and_the_measured_memory() -> None:
    rows = [
        {"exponents": "linear", "exponents in": axis, "exponents apart": gap}
        for axis, gap in (("adapters", 0.1), ("rank", 0.2), ("width", 0.12))
    ]
    rows += [{"model": "linear", "model beyond / bound": 0.9}]
    found = {target.name: target for target in bench.targets_of(rows)}
    grown = found["growth of linear: exponents of time and of flops apart"]
    assert (grown.found, grown.reached) == (0.2, False)
    assert grown.why.startswith("in rank")
    memory = [target for name, target in found.items() if "memory" in name]
    assert [(target.found, target.reached) for target in memory] == [(0.9, True), (None, None), (None, None)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.bytes_])
def test_memory_beyond_the_result_does_not_grow_with_the_layers(name: str, tmp_path: Path) -> None:
    beyond = []
    for layers in (2, 12):
        sites = bench.linears(bench.Shape(1024, 2048, layers), layers)
        folders = [str(save_adapter(bench.adapter(sites, 16, i), tmp_path / f"{layers} {i}")) for i in range(4)]
        found = harness.fresh("benchmarks.mixing_scale", "whole", way=name, folders=folders)
        beyond.append(found["rise"] - found["result"])
    assert beyond[1] < beyond[0] + 8e6, "half a result of 12 layers is three times that"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_smoke_run_has_every_part_and_draws_its_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PNG", tmp_path / "not.png")
    bench.main(["--smoke", "--json", str(tmp_path / "found.json"), "--png", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "not.png").exists()
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert set(found["tables"]) == set(bench.TABLES)
    for first in bench.TABLES.values():
        assert any(first in row for row in found["rows"]), first
    columns = [set(shown) for shown in found["tables"].values()]
    assert sum(map(len, columns)) == len(set.union(*columns)), "a row is printed in the one table whose columns it has"
    assert {row["model"] for row in found["rows"] if "model" in row} == {name for name, way in WAYS.items() if way.bytes_}
    assert all(target["reached"] is not None for target in found["targets"])


def test_ways_are_mixers_that_there_are() -> None:
    assert all(isinstance(way, Way) for way in WAYS.values())
    for way in WAYS.values():
        made = way.of([bench.adapter([SITE], 4, i) for i in range(2)], bench.stats_of(way, SITE, 2))
        assert made.meta["mix"]["how"] == way.mixer
