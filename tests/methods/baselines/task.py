"""A short run on a built-in task: by how much a method lowers the held-out loss."""

from pathlib import Path
from typing import Any

from lorakit.train.config import make_config
from lorakit.train.train import train


def final(folder: Path, method: str, *, learning_rate: float, steps: int = 30, **kwargs: Any) -> float:
    """The held-out loss after some steps of four windows."""
    config = make_config({
        "method": method, "train_data": "builtin:tkinter/chat", "max_length": 128, "max_steps": steps, "max_eval_samples": 20,
        "per_device_train_batch_size": 4, "learning_rate": learning_rate, "output_dir": str(folder / f"{method}-{learning_rate}"), **kwargs,
    })  # fmt: skip
    return train(config, quiet=True).final["loss"]
