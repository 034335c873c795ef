"""Every registered method trains on a built-in task by its name, and improves on the base; what it saved gives the same figure again."""

from pathlib import Path
from typing import Any

import pytest

from lorakit import list_methods
from lorakit.serve.open import open_adapter, open_base
from lorakit.serve.score import score
from lorakit.train.config import make_config
from lorakit.train.train import train

DATA = "builtin:tkinter/chat"
COMMON: dict[str, Any] = {
    "train_data": DATA, "max_steps": 16, "max_length": 128, "per_device_train_batch_size": 4, "learning_rate": 2e-3,
    "max_eval_samples": 24, "max_train_samples": 200, "save_steps": 0, "lr_scheduler_type": "constant",
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bitfit": {"learning_rate": 1e-2},
    "dfo_lora": {"max_train_samples": 4, "population": 6, "d": 64},
    "delta_lora": {"start": 4},
    "dropbp": {"length": 128},
    "fourierft": {"learning_rate": 5e-2, "init": "zero"},
    "inflora": {"train_data": [DATA, "builtin:email/chat"]},
    "krona": {"learning_rate": 1e-2},
    "lora_xs": {"learning_rate": 2e-2, "r": 16, "alpha": 16.0},
    "relora": {"period": 8, "warmup": 2, "r": 16},
    "vb_lora": {"vector_length": 32},
    "vera": {"learning_rate": 2e-2},
}
"""What a method needs besides: rates by its own scale, schedules that fit 16 steps, sizes that divide the base's."""
OTHERWISE = {"dfo_lora"}
"""Judged by a criterion of its own: planted weights."""


@pytest.fixture(scope="module")
def at_first() -> float:
    return score(open_base("bundled"), DATA, limit=24, max_length=128)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_trains_and_improves_on_the_base(name: str, at_first: float, tmp_path: Path) -> None:
    settings = COMMON | OWN.get(name, {}) | {"method": name, "output_dir": str(tmp_path / "out")}
    result = train(make_config(settings), quiet=True)
    print(f"{name}: {at_first:.3f} -> {result.final['loss']:.3f}, {result.trainable:,} parameters, {result.seconds:.0f} s")
    if name not in OTHERWISE:
        assert result.final["loss"] < at_first - 0.02
    again = score(open_adapter(tmp_path / "out" / "adapter"), DATA, limit=24, max_length=128)["loss"]
    if not isinstance(settings["train_data"], list):
        assert again == pytest.approx(result.final["loss"], rel=2e-3)
