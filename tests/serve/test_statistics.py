"""The statistics that regmean and fisher need, taken with the adapter on."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lorakit.adapters.io import load_adapter
from lorakit.adapters.mix import mix
from lorakit.cli.main import app
from lorakit.core.errors import BadParameter, CheckpointError
from lorakit.serve.open import open_adapter, open_base
from lorakit.serve.score import prepared
from lorakit.serve.statistics import collect, load_statistics, save_statistics
from lorakit.train.metrics import forward_loss
from lorakit.train.train import train
from tests.train.runs import config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a trained adapter, its data)."""
    settings = config(tmp_path_factory.mktemp("run"), learning_rate=5e-2)
    train(settings, quiet=True)
    return Path(settings.output_dir) / "adapter", settings.sources[0][0]


def test_the_gram_is_that_of_the_inputs(run: tuple[Path, str]) -> None:
    opened = open_adapter(run[0])
    found = collect(opened, run[1], "gram")
    side = prepared(opened, run[1]).valid
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = opened.model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(args[0].detach().flatten(0, 1))
    )
    with torch.no_grad():
        for item in side.items:
            forward_loss(opened.model, side.collate([item]))
    handle.remove()
    X = torch.cat(seen)
    assert torch.allclose(found[name], X.T @ X / len(X), rtol=1e-3, atol=1e-5)


def test_fisher_is_the_mean_square_of_a_rows_gradient(run: tuple[Path, str]) -> None:
    opened = open_adapter(run[0])
    found = collect(opened, run[1], "fisher")
    side = prepared(opened, run[1]).valid
    name = "model.layers.0.self_attn.q_proj"
    W: torch.Tensor = opened.model.get_submodule(name).weight  # type: ignore[assignment]
    wanted = torch.zeros_like(W)
    for item in side.items:
        W.requires_grad_(True).grad = None
        forward_loss(opened.model, side.collate([item]))[0].backward()
        assert W.grad is not None
        wanted += W.grad.square()
    W.requires_grad_(False)
    assert torch.allclose(found[name], wanted / len(side.items), rtol=1e-3, atol=1e-9)


def test_from_the_command_line_to_a_mix(run: tuple[Path, str], tmp_path: Path) -> None:
    adapter, data = run
    for kind, how in (("gram", "regmean"), ("fisher", "fisher")):
        file = tmp_path / f"{kind}.safetensors"
        words = ["statistics", str(adapter), "--data", data, "--kind", kind, "--out", str(file)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        words = ["mix", "--how", how, str(adapter), str(adapter), "--stats", str(file), str(file), "--out", str(tmp_path / how)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        mixed, one = load_adapter(tmp_path / how), load_adapter(adapter)
        for name, delta in mixed.deltas().items():
            assert torch.allclose(delta.weight(), one.deltas()[name].weight(), atol=1e-4)
        merged = CliRunner().invoke(app, ["merge", str(tmp_path / how), "--out", str(tmp_path / f"{how} merged")])
        assert "verified on" in merged.output, (merged.output, merged.exception)
    stats = [load_statistics(tmp_path / "gram.safetensors")] * 2
    assert mix([load_adapter(adapter)] * 2, "regmean", stats=stats).meta["mix"]["lost"]["total"] == 0


def test_what_cannot_be_collected_or_read(run: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="there is no statistic 'mean'; expected gram or fisher"):
        collect(open_adapter(run[0]), run[1], "mean")
    with pytest.raises(BadParameter, match="give an adapter, not a base alone"):
        collect(open_base(str(run[0].parents[1] / "model")), run[1], "gram")
    with pytest.raises(CheckpointError, match="there are no statistics"):
        load_statistics(tmp_path / "none.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_statistics({"a": torch.zeros(1)}, tmp_path / "file" / "s.safetensors")
