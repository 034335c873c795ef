"""What `lorakit train` shows to an init that needs data: the run's own batches and loss, divided among processes, and only once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.io import load_adapter
from lorakit.core import attach as attach_module
from lorakit.train.distributed import World
from lorakit.train.metrics import forward_loss
from lorakit.train.run import Run
from lorakit.train.stream import calibration
from lorakit.train.train import build, train
from tests.train.runs import config
from tests.train.test_resume import adapter_bytes

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, False)


def ids_of(shown: Any) -> list[list[int]]:
    return [row.tolist() for batch in shown.batches for row in batch["input_ids"]]


def test_processes_share_the_batches(tmp_path: Path) -> None:
    settings = config(tmp_path, packing=False)
    side = build(settings, ALONE).data.train
    whole = calibration(side, settings, ALONE, 5)
    assert whole.loss is forward_loss
    assert len(whole.batches) == 5
    assert len(ids_of(whole)) == 10
    shares = [calibration(side, settings, World(rank, 2, CPU, False), 5) for rank in range(2)]
    assert [len(share.batches) for share in shares] == [3, 2]
    assert sorted(ids_of(whole)) == sorted(ids_of(shares[0]) + ids_of(shares[1]))
    for rank in range(2):  # under a sharded base a forward is a common one
        assert ids_of(calibration(side, settings, World(rank, 2, CPU, True), 5)) == ids_of(whole)
    assert len(ids_of(calibration(side, settings, ALONE, 0))) == len(side.items)
    assert ids_of(calibration(side, settings.model_copy(update={"seed": 1}), ALONE, 5)) != ids_of(whole)
    moment = torch.ones(3)
    whole.total_(moment)
    assert moment.tolist() == [1, 1, 1]


@pytest.mark.parametrize("method", ["eva", "lora_ga", "inflora"])
def test_a_resumed_run_does_not_begin_from_data_again(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sites and ranks are in the checkpoint: other data or another machine could give others."""
    keys = {"method": method, "max_steps": 5, "save_steps": 2, **({"rho": 4.0, "r": 3} if method == "eva" else {})}
    train(config(tmp_path, output_dir=str(tmp_path / "whole"), **keys), quiet=True)
    real = Run._step
    with monkeypatch.context() as m:
        m.setattr(Run, "_step", lambda self, p: real(self, p) if self.at.step < 3 else (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, output_dir=str(tmp_path / "cut"), **keys), quiet=True)

    def refuse(*args: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(attach_module, "observe", refuse)
    train(config(tmp_path, output_dir=str(tmp_path / "cut"), resume="auto", **keys), quiet=True)
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "cut")
    ranks = {len(t) for key, t in load_adapter(tmp_path / "cut/adapter").tensors.items() if key.endswith(".A")}
    assert (len(ranks) > 1) == (method == "eva"), "no rank moved: the test shows nothing"
    with pytest.raises(AssertionError, match="calibrated again"):
        train(config(tmp_path, output_dir=str(tmp_path / "new"), **keys), quiet=True)
