"""What is found on a machine: facts for everybody, problems with what to type."""

from pathlib import Path

import pytest

from lorakit.train import doctor
from lorakit.train.doctor import examine
from tests.train.runs import model_folder


def problems(model: str | None = None) -> dict[str, bool]:
    return {f"{p.what}; {p.do}": p.needed for p in examine(model).problems}


def test_a_sound_machine_has_nothing_broken() -> None:
    found = examine("bundled")
    assert [*found.facts] == [
        "versions", "processor", "accelerator", "extras", "what a run uses", "folders", "environment", "model",
    ]  # fmt: skip
    assert not any(problem.needed for problem in found.problems), found.problems
    assert found.facts["model"]["type"] == "llama" and found.facts["model"]["chat template"] == "yes"
    assert all(fact for facts in found.facts.values() for fact in facts.values())


def test_what_is_missing_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name == "jinja2":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = problems()
    assert found["jinja2 is not installed; pip install jinja2"]
    assert found["transformers 4.57.1 is older than 5; pip install -U 'transformers>=5'"]
    assert found["there is no C++ compiler, so no layer is compiled; install g++ or clang++ if runs are long"] is False


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert any("cannot read" in what and needed for what, needed in problems(str(tmp_path)).items())
    folder = tmp_path / "model"
    model_folder(folder)
    assert not any(problems(str(folder)).values())
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    found = problems(str(folder))
    assert found[f"{folder} holds no weights; save the model as safetensors"]
    assert found[f"{folder} holds no tokenizer; save the tokenizer beside the model"]


def test_a_name_of_the_hub_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert problems("nobody/no-such-model")[
        "'nobody/no-such-model' is no folder and not in the cache of models; unset HF_HUB_OFFLINE to fetch it, or give a folder"
    ]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not any(problems("nobody/no-such-model").values())


def test_a_full_or_closed_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "ROOM", 2**60)
    assert any(what.endswith("remove old runs and models, or use another disk") for what in problems())
    real = doctor.os.access
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False if Path(path) == tmp_path else real(path, mode))
    assert problems()[f"{tmp_path} is not writable: runs cannot be written here; give output_dir elsewhere"] is False
