"""An adapter that was trained for a moment, once a file."""

from pathlib import Path

import pytest

from lorakit.train.train import train
from tests.train.runs import config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("run")
    settings = config(tmp, learning_rate=5e-2)
    train(settings, quiet=True)
    return Path(settings.output_dir) / "adapter"
