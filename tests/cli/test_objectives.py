"""Every objective as it is typed: train, eval, merge, on a decoder and on an encoder-decoder, and preferences on the bundled base."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.cli.typed import run
from tests.train.runs import model_folder

FIGURES = {
    "pair": {"loss", "perplexity", "bits_per_byte"},
    "text": {"loss", "perplexity", "bits_per_byte"},
    "classify": {"loss", "accuracy", "macro_f1"},
    "tag": {"loss", "accuracy", "entity_f1"},
    "preference": {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected"},
    "feedback": {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "kl"},
}


def data(path: Path, shape: str, n: int = 40) -> str:
    rng = random.Random(0)
    words = [["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 5))) for _ in range(4)] for _ in range(n)]
    make: dict[str, Any] = {
        "pair": lambda w, i: {"prompt": w[0], "completion": w[1]},
        "text": lambda w, i: {"text": " ".join(w)},
        "classify": lambda w, i: {"text": w[0], "label": "ab"[i % 2]},
        "tag": lambda w, i: {"tokens": w, "tags": ["O", "B-X", "I-X", "O"]},
        "preference": lambda w, i: {"prompt": w[0], "chosen": w[1], "rejected": w[2]},
        "feedback": lambda w, i: {"prompt": w[0], "completion": w[1], "label": i % 2 == 0},
    }
    path.write_text("".join(json.dumps(make[shape](w, i)) + "\n" for i, w in enumerate(words)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("arch", [pytest.param("llama", marks=pytest.mark.slow), "t5"])
@pytest.mark.parametrize("shape", FIGURES)
def test_every_objective_from_data_to_a_merged_model(tmp_path: Path, arch: str, shape: str) -> None:
    if (arch, shape) == ("t5", "text"):
        pytest.skip("an encoder-decoder has no text to continue")
    rows, adapter = data(tmp_path / "rows.jsonl", shape), str(tmp_path / "out" / "adapter")
    words = ["train", "--model", model_folder(tmp_path / "model", arch), "--train-data", rows, "--output-dir", str(tmp_path / "out")]
    run(*words, "--method", "lora", "--max-steps", "3", "--per-device-train-batch-size", "4", "--quiet")
    final = json.loads((tmp_path / "out" / "result.json").read_text())["final"]
    assert set(final) == FIGURES[shape]
    found = json.loads(run("eval", adapter, "--data", rows, "--json"))
    assert found == pytest.approx(final, abs=1e-5)
    assert "verified" in run("merge", adapter, "--out", str(tmp_path / "merged"))


def test_texts_are_nothing_for_an_encoder_decoder(tmp_path: Path) -> None:
    model, rows = model_folder(tmp_path / "model", "t5"), data(tmp_path / "rows.jsonl", "text")
    said = run("train", "--model", model, "--train-data", rows, "--output-dir", str(tmp_path / "out"), code=2)
    assert "these rows are text data; expected {prompt, completion} rows" in said


@pytest.mark.slow
def test_preferences_on_the_bundled_base(tmp_path: Path) -> None:
    rows, out = data(tmp_path / "prefs.jsonl", "preference"), tmp_path / "out"
    words = ["train", "--train-data", rows, "--method", "lora", "--max-steps", "4", "--logging-steps", "1", "--max-length", "64"]
    run(*words, "--per-device-train-batch-size", "2", "--learning-rate", "2e-3", "--output-dir", str(out), "--quiet")
    first, *_, last = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(0.6931471824645996, abs=0)
    assert "eval_margin" in last
    assert set(json.loads(run("eval", str(out / "adapter"), "--data", rows, "--json"))) == FIGURES["preference"]
