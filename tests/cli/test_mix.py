"""`lorakit mix`, as a user types it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import MIXERS, mix
from lorakit.cli.main import app
from tests.adapters.mix.values import adapter, close, pair, weight


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        save_adapter(adapter(pair(i)), tmp_path / name)
    return tmp_path


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["mix", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def test_folders_weights_and_options(folder: Path) -> None:
    text = run("--how", "ties", folder / "a", folder / "b", "--weights", 0.7, -0.3, "--density", 0.5, "--out", folder / "out")
    wanted = mix([adapter(pair(0)), adapter(pair(1))], "ties", weights=[0.7, -0.3], density=0.5)
    assert close(weight(load_adapter(folder / "out")), weight(wanted), 1e-6)
    assert "ties of 2 adapters at 1 sites, in delta space" in text
    assert f"cut off: {100 * wanted.meta['mix']['lost']['total']:.2f} % of the norm" in text
    assert json.loads((folder / "out" / "adapter.json").read_text())["meta"]["mix"]["weights"] == [0.7, -0.3]


def test_an_exact_mix_says_so_and_an_inexact_one_too(folder: Path) -> None:
    assert "nothing was cut off" in run(folder / "a", folder / "b", "--out", folder / "exact")
    assert "makes cross terms" in run(folder / "a", folder / "b", "--space", "factor", "--out", folder / "inexact")


def test_a_recipe(folder: Path) -> None:
    (folder / "r.yaml").write_text("of: [a, {how: svd, rank: 2, of: [b, c]}]\nweights: [1, 0.5]\n")
    run("--recipe", folder / "r.yaml", "--out", folder / "out")
    inner = mix([adapter(pair(1)), adapter(pair(2))], "svd", rank=2)
    assert close(weight(load_adapter(folder / "out")), weight(mix([adapter(pair(0)), inner], weights=[1.0, 0.5])), 1e-6)
    assert "a recipe says everything; besides it were given" in run(
        folder / "a", "--recipe", folder / "r.yaml", "--out", folder / "x", code=2
    )


def test_all_mixers_are_listed() -> None:
    text = run("--list")
    assert all(name in text for name in MIXERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "where the result goes is missing"),
        (["a", "b", "--weights", "--out", "x"], "--weights is followed by nothing that it takes"),
        (["a", "b", "--weights", "0.5", "--out", "x"], "1 weights for 2 adapters"),
        (["a", "b", "--how", "tis", "--out", "x"], "Did you mean 'ties'"),
        (["a", "b", "--how", "ties", "--density", "-1", "--out", "x"], "density=-1"),
        (["a", "nowhere", "--out", "x"], "there is no folder"),
        (["--out", "x"], "no adapter was given"),
    ],
)
def test_what_was_typed_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    assert message in run(*words, code=2)
    assert not (folder / "x").exists()


def test_a_result_never_lies_over_its_source(folder: Path) -> None:
    """Saved as a whole: the folder is read before it is written."""
    before = weight(load_adapter(folder / "a"))
    run(folder / "a", "--weights", 2.0, "--out", folder / "a")
    assert torch.allclose(weight(load_adapter(folder / "a")), 2 * before, atol=1e-5)
