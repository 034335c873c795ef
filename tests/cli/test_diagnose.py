"""`lorakit distance` and `lorakit diagnose`, as a user types them, on adapters that were attached and saved."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lorakit.adapters.diagnose.distance import distance
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.cli.main import app
from lorakit.train.source_model import load_model
from tests.adapters.subject import made_by_peft, shaken
from tests.train.runs import model_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three adapters of it, one of another base, and the base fine-tuned."""
    home = tmp_path_factory.mktemp("home")
    model_folder(home / "model")
    model_folder(home / "other", seed=5)
    for folder, base, name, seed, kwargs in (
        ("a", "model", "lora", 1, {"r": 2}),
        ("b", "model", "rslora", 2, {"r": 3, "sites": ["q_proj", "v_proj"]}),
        ("c", "model", "dora", 3, {"r": 2}),
        ("d", "other", "lora", 4, {"r": 2}),
        ("e", "model", "lora", 5, {"r": 2, "sites": ["up_proj"]}),
    ):
        shaken(load_model(str(home / base)), name, seed=seed, **kwargs).save(home / folder)
    tuned = load_model(str(home / "model"))
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(6)))
    tuned.save_pretrained(home / "tuned")
    return home


def run(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_distance(home: Path, tmp_path: Path) -> None:
    png = tmp_path / "distance.png"
    text = run("distance", home / "a", home / "b", "--png", png)
    assert all(word in text for word in ("a and b", "q_proj", "total", f"picture: {png}", "10 weights only in a"))
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("distance", home / "a", home / "b", "--json"))
    read = {name: load_adapter(home / name) for name in "ab"}
    assert found == json.loads(json.dumps(distance(read).as_dict()))
    assert found["adapters"] == ["a", "b"]
    some = json.loads(run("distance", home / "a", home / "b", "--json", "--sites", "q_proj", "--sites", "layers.1.self_attn.v_proj"))
    assert len(some["pairs"][0]["sites"]) == 3


def test_distance_of_more_and_of_one_that_rescales(home: Path) -> None:
    assert "dora rescales W itself" in run("distance", home / "a", home / "b", home / "c", code=2)
    found = json.loads(run("distance", home / "a", home / "b", home / "c", "--model", home / "model", "--json"))
    assert len(found["matrices"]["cosine"]) == 3
    assert [found["matrices"]["cosine"][i][i] for i in range(3)] == [1.0] * 3
    assert "3 adapters" in run("distance", home / "a", home / "b", home / "c", "--model", home / "model")


def test_distance_to_one_that_peft_made(home: Path, tmp_path: Path) -> None:
    import peft

    made_by_peft(load_model(str(home / "model")), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "p")
    found = json.loads(run("distance", home / "a", tmp_path / "p", "--model", home / "model", "--json"))
    assert len(found["pairs"][0]["sites"]) == 2


def test_names_tell_folders_apart(home: Path, tmp_path: Path) -> None:
    folders = [tmp_path / run / "adapter" for run in ("one", "two")]
    for folder, name in zip(folders, "ab", strict=True):
        save_adapter(load_adapter(home / name), folder)
    assert json.loads(run("distance", *folders, "--json"))["adapters"] == ["one/adapter", "two/adapter"]
    assert json.loads(run("distance", folders[0], home / "b", "--json"))["adapters"] == ["one/adapter", "b"]
    save_adapter(load_adapter(home / "b"), tmp_path / "more" / "one" / "adapter")
    same = (folders[0], tmp_path / "more" / "one" / "adapter", home / "c", "--model", home / "model", "--json")
    assert json.loads(run("distance", *same))["adapters"] == [f"{tmp_path.name}/one/adapter", "more/one/adapter", "c"]
    assert "given twice" in run("distance", home / "a", home / "a", code=2)


def test_subspace(home: Path, tmp_path: Path) -> None:
    png = tmp_path / "phi.png"
    assert "2×3" in run("diagnose", "subspace", home / "a", home / "b", "--png", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("diagnose", "subspace", home / "a", home / "b", "--space", "A", "--json"))
    assert (found["space"], len(found["sites"]), len(found["sites"][0]["grid"][0])) == ("A", 4, 3)
    assert "there is no space 'a'" in run("diagnose", "subspace", home / "a", home / "b", "--space", "a", code=2)


def test_amplification(home: Path, tmp_path: Path) -> None:
    png = tmp_path / "amplification.png"
    assert "amplification by" in run("diagnose", "amplification", home / "a", "--model", home / "model", "--png", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("diagnose", "amplification", home / "c", "--model", home / "model", "--sites", "v_proj", "--json"))
    assert len(found["sites"]) == 2
    assert found["sites"][0]["along_weight"] >= found["sites"][0]["along_update"] > 0


def test_spectrum(home: Path, tmp_path: Path) -> None:
    png = tmp_path / "spectrum.png"
    text = run("diagnose", "spectrum", home / "a", "--model", home / "model", "--png", png, "--top", "4", "--epsilon", "0.9")
    assert "of 4" in text
    assert png.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("diagnose", "spectrum", home / "a", "--no-intruders", "--json"))
    assert {s["rank"] for s in found["sites"]} == {2}
    assert {s["intruders"] for s in found["sites"]} == {None}


def test_spectrum_of_a_full_fine_tuning(home: Path) -> None:
    found = json.loads(run("diagnose", "spectrum", home / "tuned", "--model", home / "model", "--sites", "q_proj", "--json"))
    assert {s["rank"] for s in found["sites"]} == {32}
    assert min(s["rank90"] for s in found["sites"]) > 10
    assert "give the one that it was tuned from with --model" in run("diagnose", "spectrum", home / "tuned", code=2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distance", "a"], "a distance needs at least two"),
        (["distance", "a", "d"], "a was made for model ("),
        (["distance", "b", "e"], "b and e change no weight in common"),
        (["distance", "a", "nowhere"], "there is no folder"),
        (["distance", "a", "b", "--sites", "q_prj"], "Did you mean 'q_proj'"),
        (["diagnose", "subspace", "a", "d"], "--force"),
        (["diagnose", "amplification", "a"], "does not name its base; give it with --model"),
        (["diagnose", "amplification", "a", "--model", "other"], "but this model is other"),
        (["diagnose", "spectrum", "a", "--model", "other"], "but this model is other"),
        (["diagnose", "spectrum", "a"], "does not name its base; give it with --model (or leave W aside: --no-intruders)"),
        (["distance", "a", "c", "--model", "other"], "but this model is other"),
        (["diagnose", "subspace", "a", "c", "--model", "other"], "but this model is other"),
        (["diagnose", "spectrum", "a", "--no-intruders", "--model", "other"], "but this model is other"),
        (["distance", "a", "b", "--png", "no/x.png"], "there is no folder"),
        (["diagnose", "subspace", "a", "b", "--png", "no/x.png"], "there is no folder"),
        (["diagnose", "amplification", "a", "--model", "model", "--png", "no/x.png"], "there is no folder"),
        (["diagnose", "spectrum", "a", "--model", "model", "--png", "no/x.png"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(home: Path, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    text = run(*(f"./{w}" if (home / w).exists() or w == "nowhere" else w for w in words), code=2)
    assert expected in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_force(home: Path) -> None:
    assert json.loads(run("distance", home / "a", home / "d", "--force", "--json"))["pairs"]
    assert json.loads(run("distance", home / "a", home / "c", "--force", "--json", "--model", home / "other"))["pairs"]
    assert json.loads(run("diagnose", "amplification", home / "a", "--model", home / "other", "--force", "--json"))["sites"]


@pytest.mark.parametrize("words", [["distance"], ["diagnose"], *(["diagnose", n] for n in ("subspace", "amplification", "spectrum"))])
def test_every_command_explains_itself(words: list[str]) -> None:
    assert len(run(*words, "--help").splitlines()) > 4
