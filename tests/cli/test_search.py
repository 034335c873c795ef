"""`lorakit mix-search` as a user types it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorakit.adapters.io import load_adapter
from lorakit.cli.main import app
from lorakit.train.train import train
from tests.train.runs import config, model_folder, text_file

WORDS = ("red ", "green ", "blue ")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three adapters of it, each for a word of its own, and a few rows of the first word."""
    tmp = tmp_path_factory.mktemp("search")
    model = model_folder(tmp / "model")
    for i, word in enumerate(WORDS):
        rows = [{"text": word * (3 + n % 5)} for n in range(20)]
        data = tmp / f"{i}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train(
            config(tmp, model=model, train_data=str(data), output_dir=str(tmp / f"run{i}"), learning_rate=5e-2, r=2 + i, seed=i), quiet=True
        )
    few, other = ([{"text": WORDS[0] * n} for n in lengths] for lengths in ((4, 6, 9), (5, 7)))
    (tmp / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    (tmp / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    text_file(tmp / "unlike.jsonl")
    return tmp


def folders(world: Path) -> list[str]:
    return [str(world / f"run{i}" / "adapter") for i in range(3)]


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["mix-search", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.mark.parametrize(
    ("how", "options", "n"), [("lorahub", ["--budget", "12"], 12), ("learned", ["--steps", "8"], 9), ("nnls", ["--budget", "6"], 6)]
)
def test_each_way_finds_a_mixture_that_is_saved(world: Path, tmp_path: Path, how: str, options: list[str], n: int) -> None:
    data = str(world / "few.jsonl")
    text = run(
        *folders(world), "--data", data, "--how", how, *options, "--eval-data", str(world / "other.jsonl"), "--out", str(tmp_path / "out")
    )
    assert f"{n} evaluations" in text and f"adapter: {tmp_path / 'out'}" in text
    assert "loss on the other examples" in text and "does not help" not in text
    made = load_adapter(tmp_path / "out")
    assert made.meta["search"]["how"] == how and made.meta["search"]["loss"] < made.meta["search"]["base_loss"]
    assert len(made.meta["mix"]["sources"]) == 3
    scored = CliRunner().invoke(app, ["eval", str(tmp_path / "out"), "--data", data, "--whole", "--json"])
    assert json.loads(scored.output)["loss"] == pytest.approx(made.meta["search"]["loss"], rel=1e-4)


def test_a_grid_of_one_adapter(world: Path, tmp_path: Path) -> None:
    words = ["--data", str(world / "few.jsonl"), "--how", "grid", "--values", "0,0.5,1", "--json", "--out", str(tmp_path / "out")]
    found = json.loads(run(folders(world)[0], *words))
    assert [one["weights"] for one in found["tried"]] == [[[0.0]], [[0.5]], [[1.0]]]
    assert found["weights"] == [1.0] and found["loss"] == min(one["loss"] for one in found["tried"]) < found["base"]


def test_shots_rank_and_seed(world: Path, tmp_path: Path) -> None:
    words = ["--data", str(world / "few.jsonl"), "--shots", "1", "--rank", "2", "--budget=5", "--json"]
    one, other, third = (json.loads(run(*folders(world), *words, "--out", str(tmp_path / s), "--seed", s)) for s in ("3", "3", "4"))
    assert one == other != third
    assert {len(f.A) for f in load_adapter(tmp_path / "3").factors().values()} == {2}
    assert one["cut"] != one["loss"], "what is saved is measured, too"
    text = run(*folders(world), *words[:-1], "--seed", "3", "--out", str(tmp_path / "again"))
    assert f"loss on the examples after the cut: {one['cut']:.4f}" in text
    whole = json.loads(run(*folders(world), *words[:2], *words[4:], "--out", str(tmp_path / "whole"), "--seed", "3"))
    assert whole["base"] != one["base"]


def test_a_mixture_that_does_not_help_says_so(world: Path, tmp_path: Path) -> None:
    words = ["--data", str(world / "few.jsonl"), "--how", "grid", "--values", "[8]", "--eval-data", str(world / "unlike.jsonl")]
    assert "the mixture does not help" in run(folders(world)[0], *words, "--out", str(tmp_path / "out"))


def test_list_names_the_ways_and_their_options() -> None:
    text = run("--list")
    assert all(word in text for word in ("lorahub", "learned", "grid", "nnls", "budget=40", "l1=0.05", "by=module"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: adapter folders, --data, --out FOLDER"),
        (["a"], "missing: --data, --out FOLDER"),
        (
            ["FOLDER", "--data", "DATA", "--out", "OUT", "--how", "lorahob"],
            "no way to find weights is called 'lorahob'. Did you mean 'lorahub'",
        ),
        (["FOLDER", "--data", "DATA", "--out", "OUT", "--bugdet", "3"], "lorahub has no option 'bugdet'. Did you mean 'budget'"),
        (["FOLDER", "--data", "DATA", "--out", "OUT", "--budget", "none"], "lorahub: budget='none'"),
        (["FOLDER", "--data", "./nowhere.jsonl", "--out", "OUT"], "is no file or folder"),
        (["./nowhere", "--data", "DATA", "--out", "OUT"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(world: Path, tmp_path: Path, words: list[str], message: str) -> None:
    places = {"FOLDER": folders(world)[0], "DATA": str(world / "few.jsonl"), "OUT": str(tmp_path / "out")}
    text = run(*(places.get(word, word) for word in words), code=2)
    assert message in text and text.startswith("error: ") and text.count("\n") == 1
    assert not (tmp_path / "out").exists()
