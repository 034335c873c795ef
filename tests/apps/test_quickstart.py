"""The quickstart, short: every arm trains, the report is complete, and the base comes back bit for bit between trials."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lorakit.apps.quickstart import arms, quickstart
from lorakit.core.attach import attach
from lorakit.train.config import BUNDLED
from lorakit.train.source_model import load_model


@pytest.mark.slow
def test_a_short_quickstart_reports_everything(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    quickstart(tmp_path, steps=3, eval_windows=4, console=console)
    report = json.loads((tmp_path / "report.json").read_text())
    for key in ("base_loss", "adapter_loss", "full_loss", "merge_max_abs_diff", "trainable_params", "seconds"):
        assert isinstance(report[key], int | float), key
    assert report["adapter_loss"] < report["base_loss"]
    assert report["full_loss"] < report["base_loss"]
    assert report["merge"]["ok"]
    assert all(len(arm["trials"]) == 3 for arm in report["arms"].values())
    assert len(report["completions"]) == 3
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter", "curve.png", "report.json", "merged"}
    text = console.export_text()
    for word in ("head only", "norms only", "full fine-tuning", "bits per byte", "merge --verify", "adapter:"):
        assert word in text


def test_arms_share_one_model_that_comes_back_bit_for_bit() -> None:
    model = load_model(BUNDLED)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    total = sum(v.numel() for v in model.parameters())
    counts = {}
    for arm in arms(4):
        adapted = attach(model, arm.method())
        counts[arm.name] = adapted.params().numel()
        with torch.no_grad():
            for row in adapted.params():
                row.tensor.add_(1.0)
        adapted.detach()
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert counts["full fine-tuning"] == total
    assert counts["LoRA r=4"] < 0.02 * total
    assert counts["head only"] == model.get_output_embeddings().weight.numel()
