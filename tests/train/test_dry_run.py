"""--dry-run says what a run would do, and writes nothing."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from lorakit.core.events import Step
from lorakit.core.method import list_methods
from lorakit.train.distributed import world
from lorakit.train.dry_run import dry_run
from lorakit.train.run import Run
from lorakit.train.train import build
from tests.train.runs import config


@pytest.mark.parametrize("method", list_methods())
def test_parameter_counts_and_memory_rows_are_those_of_a_real_step(tmp_path: Path, method: str) -> None:
    settings = config(tmp_path, method=method, **({"target_r": 1} if method == "adalora" else {}))
    preview = dry_run(settings)
    parts = build(settings, world())
    run = Run(parts.adapted, parts.data, settings, world(), out=None, quiet=True)
    run.gradients(next(run.stream()), Step(0, run.total))
    assert preview.table.numel() == run.table.numel() == sum(n for _, _, n in preview.sites)
    run.optimizer.step()
    state = [t for s in run.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert preview.memory.optimizer == sum(t.untyped_storage().nbytes() for t in state)
    assert preview.memory.weights == weights(parts.adapted.model)
    assert not (tmp_path / "out").exists()


def weights(model: torch.nn.Module) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()] if t.numel()}
    return sum(storages.values())


def test_it_prints_configuration_sites_and_memory(tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    dry_run(config(tmp_path, method="lora", alpha=3)).show(console)
    text = console.export_text()
    for expected in (
        "alpha: 3",
        "r: 2",
        "learning_rate: 0.01",
        "model.layers.1.mlp.down_proj",
        "32 × 64",
        "activations",
        "optimizer",
        "packed into",
    ):
        assert expected in text
