"""`lorakit library` and `lorakit ensemble`, as a user types them."""

import json
from pathlib import Path

import pytest

from tests.cli.typed import run
from tests.serve.values import saved
from tests.train.runs import class_file, model_folder, text_file


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three adapters that name it, and a library of them."""
    root = tmp_path_factory.mktemp("library")
    base = model_folder(root / "model")
    for i, (letter, name) in enumerate({"q": "letters", "7": "digits", "#": "signs"}.items()):
        file = root / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": letter * (3 + j)}) + "\n" for j in range(30)))
        folder = saved(root / name / "adapter", base, i, r=2, alpha=2.0 + i)
        text = run("library", "add", str(root / "lib"), str(folder), "--data", str(file), "--samples", "8")
        assert f"{name}: 8 samples; the library {root / 'lib'} holds {i + 1} adapter{'s' if i else ''}\n" in text
    return root


def test_search_finds_the_task_that_a_prompt_is_like(there: Path) -> None:
    for letter, name in {"q": "letters", "7": "digits", "#": "signs"}.items():
        hits = json.loads(run("library", "search", str(there / "lib"), "--prompt", letter * 5, "--json"))
        assert hits[0]["name"] == name
        assert [hit["similarity"] for hit in hits] == sorted((hit["similarity"] for hit in hits), reverse=True)
    assert "digits" in run("library", "search", str(there / "lib"), "--prompt", "777", "--k", "1")


@pytest.mark.parametrize("how", ["selection", "mixture", "fusion", "token", "arrow"])
def test_generate(there: Path, how: str) -> None:
    words = ["library", "generate", str(there / "lib"), "--prompt", "777", "--how", how, "--max-new-tokens", "6"]
    assert run(*words) == run(*words) != ""


def test_selection_is_generate_with_the_one_that_was_found(there: Path) -> None:
    rest = ["--prompt", "777", "--max-new-tokens", "8"]
    found = run("library", "generate", str(there / "lib"), "--how", "selection", *rest)
    assert found == run("generate", str(there / "digits" / "adapter"), *rest)
    assert found != run("generate", str(there / "signs" / "adapter"), *rest)


@pytest.mark.parametrize("how", ["mixture", "fusion"])
def test_export_says_what_generate_says(there: Path, tmp_path: Path, how: str) -> None:
    rest = ["--prompt", "77q", "--how", how, "--k", "2"]
    assert f"{how} of " in run("library", "export", str(there / "lib"), *rest, "--out", str(tmp_path / "one"))
    found = run("library", "generate", str(there / "lib"), *rest, "--max-new-tokens", "8")
    assert found == run("generate", str(tmp_path / "one"), "--prompt", "77q", "--max-new-tokens", "8")


def test_a_trained_encoder_makes_a_library_of_its_own(there: Path, tmp_path: Path) -> None:
    """Trained on two tasks; the third is found by it, and vectors of the base's own states are refused."""
    base, enc = str(there / "model"), str(tmp_path / "enc")
    sources = [word for name in ("letters", "digits") for word in ("--data", str(there / f"{name}.jsonl"))]
    text = run("library", "train-encoder", *sources, "--model", base, "--steps", "20", "--out", enc)
    assert "after 20 steps on 2 tasks" in text
    for name in ("letters", "digits", "signs"):
        words = (str(there / name / "adapter"), "--data", str(there / f"{name}.jsonl"), "--samples", "8", "--encoder", enc)
        run("library", "add", str(tmp_path / "lib"), *words)
    for letter, name in {"q": "letters", "7": "digits", "#": "signs"}.items():
        hits = json.loads(run("library", "search", str(tmp_path / "lib"), "--prompt", letter * 5, "--encoder", enc, "--json"))
        assert hits[0]["name"] == name
    assert "cannot be compared with" in run("library", "search", str(tmp_path / "lib"), "--prompt", "q", code=2)
    wrong = str(there / "letters" / "adapter")
    assert "train-encoder" in run("library", "search", str(tmp_path / "lib"), "--prompt", "q", "--encoder", wrong, code=2)
    assert "given twice" in run("library", "train-encoder", *sources[:2], *sources[:2], "--model", base, "--out", enc, code=2)


def test_ensemble(there: Path) -> None:
    some = [str(there / name / "adapter") for name in ("letters", "digits", "signs")]
    data = text_file(there / "data.jsonl", lines=10)
    figures = json.loads(run("ensemble", *some, "--data", data, "--whole", "--max-length", "64", "--json"))
    assert figures["loss"] < figures["member_loss"]
    assert "mutual_information" in run("ensemble", *some, "--data", data, "--whole", "--max-length", "64")
    text = run("ensemble", *some, "--prompt", "line 1", "--max-new-tokens", "5")
    assert "5 tokens: mean entropy" in text or "tokens: mean entropy" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["library", "search", "./nowhere", "--prompt", "x"], "is no library"),
        (["library", "generate", "{lib}", "--prompt", "x", "--how", "mixtur"], "Did you mean 'mixture'"),
        (["library", "export", "{lib}", "--prompt", "x", "--how", "token", "--out", "o"], "none of the ways"),
        (["library", "search", "{lib}", "--prompt", "x", "--encoder", "./nowhere"], "no folder of a sentence encoder"),
        (["library", "add", "{lib}", "{digits}", "--data", "{data}"], "has an adapter 'digits' already"),
        (["library", "add", "{lib}", "{digits}", "--data", "./nowhere.jsonl", "--name", "n"], "is no file or folder"),
        (["ensemble", "{digits}"], "give one of --data"),
        (["ensemble", "{digits}", "--data", "x", "--prompt", "y"], "give one of --data"),
        (["ensemble", "{digits}", "./nowhere", "--prompt", "y"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line(there: Path, words: list[str], said: str) -> None:
    places = {"lib": there / "lib", "digits": there / "digits" / "adapter", "data": there / "digits.jsonl"}
    text = run(*(word.format(**places) for word in words), code=2)
    assert said in text
    assert text.startswith("error: ") and text.count("\n") == 1


def test_a_peft_folder_and_another_base(there: Path, tmp_path: Path) -> None:
    run("convert", str(there / "digits" / "adapter"), "--out", str(tmp_path / "peft"))
    data = str(there / "digits.jsonl")
    assert "peft: 4 samples" in run("library", "add", str(tmp_path / "lib"), str(tmp_path / "peft"), "--data", data, "--samples", "4")
    other = model_folder(tmp_path / "other", seed=1)
    text = run("library", "search", str(there / "lib"), "--prompt", "x", "--model", other, code=2)
    assert "the library's vectors are those of hidden-mean of base" in text
    words = ["library", "add", str(tmp_path / "new"), str(there / "digits" / "adapter"), "--data", data, "--model", other]
    assert "the adapter was trained on model (" in run(*words, code=2) and not (tmp_path / "new").exists()
    assert "holds 1 adapter\n" in run(*words, "--force"), "as its message says"


def test_an_adapter_of_another_base_joins_by_force_alone(there: Path, tmp_path: Path) -> None:
    """Its base must then be told apart by whoever uses the library: vectors are of one base, updates of two."""
    other = model_folder(tmp_path / "other", seed=1)
    stranger, data = saved(tmp_path / "stranger", other, 5, r=2), str(there / "digits.jsonl")
    lib = str(tmp_path / "lib")
    run("library", "add", lib, str(there / "digits" / "adapter"), "--data", data)
    words = ["library", "add", lib, str(stranger), "--data", data, "--model", str(there / "model"), "--name", "stranger"]
    assert "the adapter was trained on other (" in run(*words, code=2)
    run(*words, "--force")
    out = ["library", "export", lib, "--prompt", "777", "--out", str(tmp_path / "out")]
    assert "they change different weights; force=True (--force)" in run(*out, code=2) and not (tmp_path / "out").exists()
    assert "mixture of " in run(*out, "--force")


def test_classes_are_samples_too(there: Path, tmp_path: Path) -> None:
    data = class_file(tmp_path / "classes.jsonl")
    text = run("library", "add", str(tmp_path / "lib"), str(there / "digits" / "adapter"), "--data", data, "--name", "classes")
    assert "classes: 32 samples" in text
