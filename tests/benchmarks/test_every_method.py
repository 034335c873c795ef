"""What every_method.py is made of: the rate that is chosen, rows held apart, commands that say what was run, rows that outlive a kill."""

import shlex
from pathlib import Path

import pytest

from benchmarks import every_method as bench
from benchmarks.every_method import Kept, Plan
from lorakit.cli import measured
from lorakit.cli.flags import parse_flags
from lorakit.core.method import describe, list_methods
from lorakit.train.config import make_config, read_config


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0}, 3, [2, 3]),
        ({1: 1.0, 2: 2.0, 3: 3.0}, 1, [2, 3, 1]),
        ({1: 3.0, 2: 1.0, 3: 2.0}, 2, [2, 3, 1]),
        ({1: 0.0, 2: 4.0, 3: 3.0, 4: 2.0, 5: 1.0}, 5, [3, 4, 5]),
        ({1: 1.0, 2: 2.0, 3: float("inf")}, 1, [2, 3, 1]),
        ({7: 1.0}, 7, [7]),
    ],
)
def test_the_rate_is_sought_uphill_from_the_middle(losses: dict[float, float], best: float, tried: list[float]) -> None:
    seen: list[float] = []

    def loss_at(rate: float) -> float:
        seen.append(rate)
        return losses[rate]

    assert bench.uphill(sorted(losses), loss_at) == best
    assert seen == tried


def test_the_rows_that_choose_are_not_those_that_are_reported(tmp_path: Path) -> None:
    choose, report = (path.read_text(encoding="utf-8").splitlines() for path in bench.halves(Plan(str(tmp_path), samples=20)))
    assert len(choose) == len(report) == 10
    assert not set(choose) & set(report)
    for half in (choose, report):  # of one kind of question as many as of the other
        assert sum("Write the signature" in row for row in half) == 5


@pytest.mark.parametrize("name", list_methods())
def test_the_command_of_a_row_is_what_was_run(name: str) -> None:
    """And every method's own settings are its parameters, its rates rising."""
    settings = Plan("").settings(name, 1e-2)
    program, command, *words = shlex.split(bench.command(settings))
    assert (program, command) == ("lorakit", "train")
    assert read_config(None, parse_flags(words)) == make_config({**settings, "output_dir": f"out/{name}"})
    own = bench.OWN.get(name, {})
    assert set(own) <= set(describe(name).parameters)
    assert {key: settings.get(key) for key in own} == own
    rates = bench.OWN_RATES.get(name, bench.RATES)
    assert list(rates) == sorted(rates)


def test_only_registered_methods_have_settings() -> None:
    assert (set(bench.OWN) | set(bench.OWN_RATES)) <= set(list_methods())


def test_rows_outlive_a_kill_and_another_plan_does_not_take_them(tmp_path: Path) -> None:
    path, plan = tmp_path / "rows.jsonl", Plan("here")
    Kept(path, plan).add({"method": "lora", "loss": 3.0})
    Kept(path, plan).add({"method": "dora", "loss": 2.0})
    path.write_text(path.read_text(encoding="utf-8") + '{"of": {"pl', encoding="utf-8")  # a torn last line
    assert Kept(path, Plan("elsewhere")).rows == {"lora": {"method": "lora", "loss": 3.0}, "dora": {"method": "dora", "loss": 2.0}}
    assert Kept(path, Plan("here", steps=plan.steps + 1)).rows == {}


def test_a_row_that_was_kept_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(_: str, function: str, **__: object) -> object:
        assert function in ("before", "by_seed"), "nothing is trained again"
        return 5.0 if function == "before" else [2.9, 3.2]

    monkeypatch.setattr(bench.harness, "alone", alone)
    kept = Kept(tmp_path / "rows.jsonl", plan := Plan(str(tmp_path)))
    for name, loss, peak in (("lora", 3.0, 20.0), ("dora", 2.5, 30.0)):
        kept.add({"method": name, "loss": loss, "rate": 1e-2, "peak MB": peak})
    lora, dora, noise = bench.rows(plan, ["dora", "lora"], kept)
    assert (lora["method"], dora["method"], dora["peak / lora"]) == ("lora", "dora", 1.5)
    assert (noise["lowest"], noise["highest"]) == (2.9, 3.2)
    (alone_,) = bench.rows(plan, ["dora"], Kept(tmp_path / "rows.jsonl", plan))
    assert alone_["peak / lora"] == 1.5, "of a LoRA that was measured before"
    del kept.rows["lora"]
    assert next(bench.rows(plan, ["dora"], kept))["peak / lora"] is None


def test_the_pages_read_what_is_printed() -> None:
    """The columns that the documentation asks a row for are those of the benchmark's table."""
    printed = set(bench.TABLES["Every method on one small task"])
    assert {"method", "loss before", "loss", "trained", "kB", "peak / lora", "step / lora", "rate", "settings"} <= printed
    assert Path(bench.__file__).stem == measured.BENCHMARK
