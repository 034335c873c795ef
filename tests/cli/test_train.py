"""`lorakit train` with files and flags in other words, as typed."""

import json
from pathlib import Path

import pytest

from tests.cli.typed import run
from tests.train.runs import model_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "model")
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f" {i}"}) + "\n" for i in range(12)))
    return tmp_path


TRL = "model_name_or_path: model\ndataset_name: rows.jsonl\nuse_peft: true\nlora_r: 2\nmax_length: 64\nmax_steps: 1\nlearning_rate: 1e-3\n"


def test_a_dry_run_says_what_keys_became(folder: Path) -> None:
    Path("sft.yaml").write_text(TRL)
    output = run("train", "sft.yaml", "--dry-run", "--lora-alpha", "4")
    assert "config: a configuration of TRL, by dataset_name, use_peft" in output
    assert "lora_r 2 -> r 2" in output and "lora_alpha 4 -> alpha 4" in output and "lr_scheduler_type linear" in output
    assert run("train", "--config", "sft.yaml", "--dry-run", "--lora-alpha", "4") == output, "as TRL's own command is typed"
    assert not Path("out").exists()


def test_single_aliases_are_flags(folder: Path) -> None:
    words = ("--model", "model", "--train-data", "rows.jsonl", "--max-length", "64", "--max-steps", "1")
    output = run("train", *words, "--lora-rank", "2", "--micro-batch-size", "2", "--learning-rate", "1e-3", "--output-dir", "out")
    assert "config: lora_rank 2 -> r 2, as LLaMA-Factory calls it" in output
    assert "config" not in run("train", *words, "--r", "2", "--quiet", "--output-dir", "quiet")


def test_names_in_brackets_are_printed_as_they_are(folder: Path) -> None:
    words = ("--model", "model", "--train-data", "rows.jsonl", "--max-length", "64", "--max-steps", "1", "--quiet")
    output = run("train", *words, "--output-dir", "out[bold]", "--train-on", "last")
    assert "adapter: out[bold]/adapter\nreport: out[bold]/report.html\n" in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRL + "load_in_8bit: true\n", "load_in_8bit: true (TRL) is not done here"),
        (TRL + "lora_rank: 8\n", "'lora_rank' is LLaMA-Factory's key"),
        ("model: [", "line 2, column 1: no YAML"),
        ("a: 1\na: 2\n", "'a' is given twice"),
    ],
)
def test_what_cannot_be_is_one_line(folder: Path, text: str, message: str) -> None:
    Path("run.yaml").write_text(text)
    output = run("train", "run.yaml", code=2)
    assert message in output and output.startswith("error: ") and output.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(("saved", "said"), [(True, "--resume auto goes on from the newest checkpoint in out"), (False, "begins again")])
def test_ctrl_c_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch, saved: bool, said: str) -> None:
    def stop(*_: object, **__: object) -> None:
        if saved:
            Path("out/checkpoint-00000005").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.train.train.train", stop)
    assert said in run("train", "--model", "model", "--train-data", "rows.jsonl", "--output-dir", "out", code=130)


def test_a_template_that_is_none_is_answered_with_the_nearest(folder: Path) -> None:
    words = ["train", "--model", "model", "--train-data", "rows.jsonl", "--output-dir", "out", "--chat-template"]
    assert "Did you mean 'llama3'" in run(*words, "lama3", code=2)
    Path("bytes.jinja").write_bytes(b"\xff\xfe\x00")
    assert "no UTF-8 text" in run(*words, "bytes.jinja", code=2)
