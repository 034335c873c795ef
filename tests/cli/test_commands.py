"""The commands that use a finished adapter, as a user types them."""

import json
from pathlib import Path

import pytest

from lorakit.train.train import train
from tests.cli.typed import run
from tests.train.runs import class_file, config


def test_train_from_yaml_and_flags(tmp_path: Path, adapter: Path) -> None:
    base = adapter.parents[1]
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {base / 'model'}\ntrain_data: {base / 'data.jsonl'}\nmax_length: 64\nmethod: dora\nr: 2\n")
    text = run("train", str(file), "--max-steps", "2", "--output-dir", str(tmp_path / "out"), "--quiet")
    assert "adapter:" in text
    assert json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())["recipe"]["name"] == "dora"
    assert "already holds a run" in run("train", str(file), "--max-steps", "2", "--output-dir", str(tmp_path / "out"), code=2)


def test_dry_run_and_keys(adapter: Path) -> None:
    base = adapter.parents[1]
    assert "activations" in run("train", "--model", str(base / "model"), "--train-data", str(base / "data.jsonl"), "--dry-run")
    assert "early_stopping_patience" in run("train", "--keys")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--lerning-rate", "1"], "unknown key 'lerning_rate' (method lora). Did you mean 'learning_rate'"),
        (["train", "--method", "lorra"], "Did you mean 'lora'"),
        (["train", "stray"], "stray: cannot be read"),
        (["train", "--r", "2", "stray"], "unexpected argument 'stray'"),
        (["eval", "./nowhere", "--data", "x.jsonl"], "there is no folder"),
        (["merge", "./nowhere", "--out", "x"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], expected: str) -> None:
    text = run(*words, code=2)
    assert expected in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_eval_generate_chat(adapter: Path) -> None:
    data = str(adapter.parents[1] / "data.jsonl")
    assert json.loads(run("eval", str(adapter), "--data", data, "--json"))["bits_per_byte"] > 0
    base = json.loads(run("eval", "base", "--model", str(adapter.parents[1] / "model"), "--data", data, "--json"))
    assert base["loss"] > json.loads(run("eval", str(adapter), "--data", data, "--json"))["loss"]
    assert run("generate", str(adapter), "--prompt", "line 1", "--max-new-tokens", "4")
    assert run("chat", str(adapter), "--message", "hello", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("classes")
    settings = config(tmp, train_data=class_file(tmp / "classes.jsonl"), max_steps=2)
    train(settings, quiet=True)
    return Path(settings.output_dir) / "adapter"


def test_a_classifier_and_a_language_model_are_not_confused(adapter: Path, classifier: Path, tmp_path: Path) -> None:
    texts, classes = str(adapter.parents[1] / "data.jsonl"), str(classifier.parents[1] / "classes.jsonl")
    assert "this is a language model" in run("eval", str(adapter), "--data", classes, code=2)
    assert "this is a classifier" in run("eval", str(classifier), "--data", texts, code=2)
    assert "generates no text" in run("generate", str(classifier), "--prompt", "x", code=2)
    assert "no perplexity of a classifier" in run("merge", str(classifier), "--out", str(tmp_path / "merged"))
    run("convert", str(classifier), "--out", str(tmp_path / "peft"))


def test_what_a_first_user_tripped_over(adapter: Path, tmp_path: Path) -> None:
    base = adapter.parents[1]
    data = ["--model", str(base / "model"), "--train-data", str(base / "data.jsonl"), "--output-dir", str(tmp_path / "out")]
    assert run("generate", str(adapter), "--prompt", "", "--max-new-tokens", "2") is not None
    assert "is not a regular expression" in run("train", *data, "--sites", "re:(", code=2)
    assert "expected float32, bfloat16, float16" in run("merge", str(adapter), "--out", str(tmp_path / "m"), "--dtype", "int8", code=2)
    assert "resume='atuo'" in run("train", *data, "--resume", "atuo", code=2)
    (tmp_path / "twice.yaml").write_text("r: 4\nmethod: lora\nr: 8\n")
    assert "'r' is given twice" in run("train", str(tmp_path / "twice.yaml"), code=2)
    (tmp_path / "broken.yaml").write_text("a: [\n")
    assert "line 2" in run("train", str(tmp_path / "broken.yaml"), code=2)
    assert "--keys" in run("train", "--qqqqqq", "1", code=2)
    assert "norm" in run("train", *data, "--unfreeze", "norm", "--dry-run")


def test_a_peft_folder_remembers_its_base(adapter: Path, tmp_path: Path) -> None:
    run("convert", str(adapter), "--out", str(tmp_path / "peft"))
    data = str(adapter.parents[1] / "data.jsonl")
    assert json.loads(run("eval", str(tmp_path / "peft"), "--data", data, "--json"))["loss"] == pytest.approx(
        json.loads(run("eval", str(adapter), "--data", data, "--max-length", "512", "--json"))["loss"], abs=1e-5
    )


def test_svd_rank_gives_plain_lora_with_its_error(adapter: Path, tmp_path: Path) -> None:
    base = adapter.parents[1]
    settings = config(base, method="dora", output_dir=str(tmp_path / "dora"), learning_rate=5e-2)
    train(settings, quiet=True)
    text = run("convert", str(tmp_path / "dora" / "adapter"), "--out", str(tmp_path / "peft"), "--svd-rank", "3")
    assert "error" in text
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (written["r"], written["use_dora"]) == (3, False)


def test_compact_leaves_out_what_can_be_drawn_again(adapter: Path, tmp_path: Path) -> None:
    base = adapter.parents[1]
    train(config(base, method="vera", output_dir=str(tmp_path / "vera"), learning_rate=5e-2), quiet=True)
    full = tmp_path / "vera" / "adapter"
    for to, name in (("peft", "adapter_model"), ("lorakit", "adapter")):
        assert "exact" in run("convert", str(full), "--to", to, "--out", str(tmp_path / to), "--compact")
        assert (tmp_path / to / f"{name}.safetensors").stat().st_size < (full / "adapter.safetensors").stat().st_size
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["save_projection"] is False
    assert "lora has no smaller form" in run("convert", str(adapter), "--out", str(tmp_path / "c"), "--compact", code=2)


def test_inspect_merge_convert(adapter: Path, tmp_path: Path) -> None:
    assert "q_proj" in run("inspect", str(adapter), "--plot", str(tmp_path / "spectrum.png"))
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert "verified on" in run("merge", str(adapter), "--out", str(tmp_path / "merged"))
    model = str(adapter.parents[1] / "model")
    run("convert", str(adapter), "--to", "peft", "--out", str(tmp_path / "peft"), "--model", model)
    assert "verified on" in run("merge", str(tmp_path / "peft"), "--out", str(tmp_path / "merged2"), "--model", model)
    run("convert", str(tmp_path / "peft"), "--to", "lorakit", "--out", str(tmp_path / "back"), "--model", model)
    assert (tmp_path / "back" / "adapter.safetensors").read_bytes() == (adapter / "adapter.safetensors").read_bytes()
