"""Configurations of other tools run as they are: the files of examples/, and with other models and data in their place."""

import json
import shutil
from pathlib import Path

import pytest

from lorakit.train.config import load_config
from lorakit.train.train import train
from tests.train.runs import model_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
MODEL = {
    "llama_factory_lora_sft": "model_name_or_path",
    "llama_factory_lora_dpo": "model_name_or_path",
    "axolotl_lora": "base_model",
    "trl_sft": "model_name_or_path",
}


def test_every_example_is_known() -> None:
    assert {file.stem for file in FILES} == MODEL.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_read_with_notes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    resolved = load_config(file, {})
    assert resolved.config.model == "bundled" and resolved.notes[0].startswith("a configuration of ")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_runs_with_another_model(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLES / "data", tmp_path / "data")
    model_folder(tmp_path / "model")
    text = file.read_text(encoding="utf-8").replace(f"{MODEL[file.stem]}: bundled", f"{MODEL[file.stem]}: model")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = load_config("run.yaml", {}).config
    assert config.model == "model"
    result = train(config, quiet=True)
    assert result.steps >= 1 and result.trainable > 0
    recipe = json.loads((Path(config.output_dir) / "adapter" / "adapter.json").read_text())["recipe"]
    assert recipe["kwargs"]["r"] == (8 if "llama" in file.stem else 16)
