"""What mixing.py states: the tasks that are opposed, the shares, the targets; and that its contenders do what their rows say."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import mixing as bench
from benchmarks.mixing import Group, Known, Way
from lorakit.adapters.mix import MIXERS, mix
from lorakit.core.adapter import Adapter
from lorakit.train.config import BUNDLED
from lorakit.train.source_model import load_model
from tests.adapters.mix.values import close
from tests.adapters.subject import shaken

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of every second adapter
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT's own call of an old name
]


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    return [shaken(load_model(BUNDLED), "lora", seed=i, r=2, sites=["q_proj", "down_proj"]).state() for i in (1, 2)]


def group(adapters: list[Adapter]) -> Group:
    return Group("2", 0, ("asyncio", "email"), adapters, [])


def change(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: f.s * f.B.double() @ f.A.double() for name, f in adapter.factors().items()}


def same(one: Adapter, other: Adapter, tolerance: float = 1e-5) -> bool:
    wanted = change(other)
    return all(close(W, wanted[name], tolerance) for name, W in change(one).items())


def test_opposed_tasks_ask_the_same_and_want_other_letters():
    large, small = (bench.rows_of(task, "valid") for task in bench.OPPOSED)
    assert [row["messages"][0] for row in large] == [row["messages"][0] for row in small]
    answers = [(a["messages"][1]["content"], b["messages"][1]["content"]) for a, b in zip(large, small, strict=True)]
    assert all(a == b.upper() and b == b.lower() for a, b in answers)
    assert any(a != b for a, b in answers)


def test_the_share_of_the_own_gain():
    known = Known({"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 1.5})
    assert known.kept({"a": 2.0, "b": 1.5}, ["a", "b"]) == 1
    assert known.kept({"a": 3.0, "b": 2.0}, ["a", "b"]) == 0
    assert known.kept({"a": 2.25, "b": 2.0}, ["a", "b"]) == 0.5
    assert known.kept({}, []) is None


def test_a_change_without_low_rank_is_kept_exactly():
    for shape in ((5, 7), (7, 5)):
        W = torch.randn(shape)
        f = bench.as_factors(W)
        assert torch.equal(f.s * f.B @ f.A, W)


def test_every_mixer_takes_part_and_slerp_with_two_alone(adapters):
    two = [way.how for way in bench.our_ways(group(adapters)) if way.space == "delta"]
    assert two == list(MIXERS)
    three = Group("3", 0, ("asyncio", "email", "xml"), adapters, [])
    assert "slerp" not in [way.how for way in bench.our_ways(three)]


def test_a_scaled_adapter(adapters):
    assert all(close(W, 2.5 * change(adapters[0])[name]) for name, W in change(bench.scaled(adapters[0], 2.5)).items())


def test_pefts_mixtures_are_read_out_as_they_are(adapters, tmp_path):
    """Its `cat` is the sum, and its `linear` is what we call factor space."""
    here = group(adapters)
    ways = {way.how: way for way in bench.Peft(here, tmp_path).ways()}
    assert set(ways) == set(bench.PEFTS)
    assert same(ways["cat"].mix(here), mix(adapters))
    assert same(ways["linear"].mix(here), mix(adapters, space="factor"))
    assert same(ways["svd"].mix(here), mix(adapters, "svd"), 1e-3)  # where singular values are close, in fp32
    assert not same(ways["linear"].mix(here), mix(adapters), 0.1)


def test_a_way_that_is_in_the_folder_is_not_run_again(adapters, tmp_path, monkeypatch):
    """A run that was stopped goes on."""
    calls = []

    def judged(way: Way, *rest: object) -> dict[str, float]:
        calls.append(way.how)
        return dict.fromkeys(("kept", "kept at λ", "unseen", "CPU s"), 0.5)

    class Judge:
        def losses(self, adapter: Adapter | None, tasks: list[str]) -> dict[str, float]:
            return dict.fromkeys(tasks, 1.0)

    monkeypatch.setattr(bench, "judged", judged)
    monkeypatch.setattr(bench, "peers", list)
    monkeypatch.setattr(bench, "made", lambda task, seed, args: Namespace(adapter=adapters[0]))
    args = Namespace(adapters=str(tmp_path), windows=1, tuning_windows=1, rank=2, steps=1, tasks=("asyncio", "email"), counts=[2], every=5)
    first = list(bench.of_seed(0, Judge(), args))
    n = len(calls)
    assert n == len(first) > 0
    file = next(Path(tmp_path).glob("found-*"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert list(bench.of_seed(0, Judge(), args)) == first
    assert len(calls) == n + 1


def test_rows_targets_and_the_picture(tmp_path):
    figures = {
        "loss / own": 1.1,
        "kept": 0.5,
        "unseen": None,
        "kept at λ": 0.6,
        "λ": 2.0,
        "CPU s": 1.0,
        "rank": 4,
        "MB": 1.0,
        "cut off": None,
    }
    runs = [figures | {"kept": 0.4}, figures, figures | {"kept": 0.9}]
    ours = bench.summarized(("8", "lorakit", "linear", "delta"), runs)
    assert (ours["kept"], ours["unseen"], ours["cut off"]) == ([0.5, 0.4, 0.9], None, None)
    theirs = bench.summarized(("8", "PEFT", "linear", "A and B"), [figures | {"kept": 0.3, "kept at λ": 0.7}])
    found = bench.targets_of([ours, theirs])
    assert [(target.found, target.reached) for target in found] == [(-0.1, False), (0.2, True)]
    assert found[0].why == "linear (delta) against linear (A and B)"
    bench.plot([ours, theirs], tmp_path / "mixing.png")
    assert (tmp_path / "mixing.png").read_bytes().startswith(b"\x89PNG")
