"""Task arithmetic for continual learning (arXiv:2311.02428): W₀ + λ Σ τ_t of adapters each trained from W₀, then a short replay."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import mix
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.serve.open import open_adapter
from lorakit.serve.score import score
from lorakit.train.config import make_config
from lorakit.train.train import train
from tests.adapters.mix.values import adapter, close, dense, pair, weight
from tests.train.runs import config, model_folder

TASKS = [pair(1, 2), pair(2, 3, s=0.7), pair(3, 1, s=-1.5)]
WORDS = ("red ", "green ")


def summed(some: list[Adapter], scale: float = 1.0, space: str = "delta") -> Adapter:
    return mix(some, "task_arithmetic", scale=scale, space=space)


@pytest.mark.parametrize("space", ["delta", "core", "knots"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 1.4])
def test_it_is_lambda_times_the_sum_in_any_order(space: str, scale: float) -> None:
    want = scale * sum(dense(f) for f in TASKS)  # type: ignore[arg-type]
    for order in itertools.permutations(TASKS):
        assert close(weight(summed([adapter(f) for f in order], scale, space)), want, 1e-5)  # type: ignore[arg-type]


def test_lambda_is_the_papers_usual_one_unless_given() -> None:
    some = [adapter(f) for f in TASKS]
    assert close(weight(mix(some, "task_arithmetic")), weight(summed(some, 0.3)))


def test_a_task_that_comes_later_is_added_to_what_there_is() -> None:
    """(τ₁ + τ₂) + τ₃: nothing of the earlier tasks is needed but their sum."""
    some = [adapter(f) for f in TASKS]
    before = summed(some[:2])
    assert close(weight(summed([before, some[2]])), weight(summed(some)), 1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_tasks_of_orthogonal_inputs_do_not_disturb_each_other(scale: float) -> None:
    """Each A reads its own columns of x, and a task's x is zero elsewhere: with λ = 1 its output is its own adapter's."""
    columns = [range(4), range(4, 7), range(7, 10)]
    parts = []
    for f, mine in zip(TASKS, columns, strict=True):
        A = torch.zeros_like(f.A)
        A[:, list(mine)] = f.A[:, list(mine)]
        parts.append(Factors(A, f.B, f.s))
    W = weight(summed([adapter(f) for f in parts], scale))
    for f, mine in zip(parts, columns, strict=True):
        x = torch.zeros(5, 10, dtype=torch.float64)
        x[:, list(mine)] = torch.randn(5, len(mine), dtype=torch.float64)
        assert close(x @ W.T, scale * x @ dense(f).T, 1e-6)
    disturbed = weight(summed([adapter(f) for f in TASKS]))
    x = torch.randn(5, 10, dtype=torch.float64)
    assert not close(x @ disturbed.T, x @ dense(TASKS[0]).T, 1e-1)


# -------------------------------------------------------------------------------------------------------------------------- with runs
@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a file for each task, and a memory of three rows of each."""
    tmp = tmp_path_factory.mktemp("tasks")
    model_folder(tmp / "model")
    files = [[{"text": word * (3 + n % 5)} for n in range(20)] for word in WORDS]
    for i, rows in enumerate([*files, [row for some in files for row in some[:3]]]):
        (tmp / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp


def task(world: Path, i: int, name: str) -> Adapter:
    """Task i learned from W₀."""
    settings = config(world, train_data=str(world / f"{i}.jsonl"), output_dir=str(world / name), learning_rate=5e-2, max_steps=10)
    train(settings, quiet=True)
    return load_adapter(world / name / "adapter")


def in_sequence(world: Path, order: tuple[int, int]) -> dict[str, torch.Tensor]:
    files = [str(world / f"{i}.jsonl") for i in order]
    out = world / "sequence{}{}".format(*order)
    train(config(world, train_data=files, output_dir=str(out), learning_rate=5e-2, max_steps=20), quiet=True)
    return {name: f.s * f.B @ f.A for name, f in load_adapter(out / "adapter").factors().items()}


@pytest.mark.slow
def test_a_task_knows_nothing_of_the_others_and_their_order_counts_only_in_sequence(world: Path) -> None:
    first, second = task(world, 0, "a0"), task(world, 1, "a1")
    again = [task(world, 1, "b1"), task(world, 0, "b0")]
    assert all(torch.equal(v, again[1].tensors[k]) for k, v in first.tensors.items())
    assert all(torch.equal(v, again[0].tensors[k]) for k, v in second.tensors.items())
    one, other = (summed(some).factors() for some in ([first, second], again))
    assert all(close(one[k].B @ one[k].A, other[k].B @ other[k].A, 1e-5) for k in one)
    one, other = in_sequence(world, (0, 1)), in_sequence(world, (1, 0))
    assert any(not close(one[k], other[k], 1e-1) for k in one)


@pytest.mark.slow
def test_a_short_replay_of_a_memory_helps_all_tasks(world: Path) -> None:
    """The last step of the method: `init_adapter` takes the sum up and trains it on a few rows of every task."""
    both = summed([task(world, i, f"c{i}") for i in range(2)], 0.3)
    both = Adapter(both.recipe, both.sites, both.tensors, both.meta | {"model": str(world / "model")})
    save_adapter(both, world / "sum")
    keys = {"train_data": str(world / "2.jsonl"), "output_dir": str(world / "replay"), "max_steps": 8, "learning_rate": 1e-2}
    plain = {k: v for k, v in config(world, **keys).model_dump(exclude_unset=True).items() if k not in ("method", "method_args")}
    train(make_config(plain | {"init_adapter": str(world / "sum")}), quiet=True)

    def losses(folder: Path) -> list[float]:
        return [score(open_adapter(folder), str(world / f"{i}.jsonl"), whole=True, max_length=64)["loss"] for i in range(2)]

    before, after = losses(world / "sum"), losses(world / "replay" / "adapter")
    assert all(a < b - 0.05 for a, b in zip(after, before, strict=True))
    assert load_adapter(world / "replay" / "adapter").meta["init_adapter"]["mix"]["how"] == "task_arithmetic"
