"""Tiny runs for the tests of this folder: a saved tiny model with a tokenizer, and configurations over it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.method import describe
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.train.config import TrainConfig, make_config
from lorakit.train.run import Run
from lorakit.train.train import train
from tests.laws.subject import SMALL


def model_folder(folder: Path, arch: str = "llama", **overrides: Any) -> str:
    """A tiny model on disk, as a user's own would be."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(arch, vocab_size=len(tokenizer), **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def text_file(path: Path, lines: int = 40) -> str:
    """Texts of very different lengths, as JSONL."""
    rows = [{"text": f"line {i} " + "abc de " * (1 + 7 * i % 23)} for i in range(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def class_file(path: Path, n: int = 40) -> str:
    """Two classes that a bag of bytes can tell apart."""
    rows = [{"text": ("aaa " if i % 2 else "zzz ") * (1 + i % 5), "label": "a" if i % 2 else "z"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(tmp: Path, **keys: Any) -> TrainConfig:
    """A run of a few steps in `tmp`; model and data are made when missing."""
    folder = tmp / "model"
    if "model" not in keys and not folder.exists():
        model_folder(folder)
    data = tmp / "data.jsonl"
    if "train_data" not in keys and not data.exists():
        text_file(data)
    defaults = {
        "model": str(folder), "train_data": str(data), "output_dir": str(tmp / "out"), "max_length": 64, "max_steps": 6,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 2,
        "report_samples": 0,
    }  # fmt: skip
    known = describe(str(keys.get("method", "lora"))).parameters
    small = {k: v for k, v in {**SMALL, "r": 4 if "n" in known else 2, "target_r": 2}.items() if k in known}
    return make_config(small | defaults | keys)


def command(settings: TrainConfig, *extra: str) -> list[str]:
    """The command line of a configuration."""
    flat = settings.model_dump(mode="json", exclude={"method_args"}) | settings.method_args
    flags = [
        word
        for k, v in flat.items()
        if v is not None
        for word in (f"--{k.replace('_', '-')}", json.dumps(v) if not isinstance(v, str) else v)
    ]
    return [sys.executable, "-m", "lorakit.cli.main", "train", *flags, "--quiet", *extra]


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a process that shares this one's Python path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a process that must succeed; its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def stopped(settings: TrainConfig, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and be killed before step `at`."""
    real = Run._step

    def dies(self: Run, progress: Any) -> dict[str, Any]:
        if self.at.step == at:
            raise KeyboardInterrupt
        return real(self, progress)

    with monkeypatch.context() as m:
        m.setattr(Run, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(settings, quiet=True)
