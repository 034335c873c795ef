"""The memory of a step is asked for on the micro-batch that needs the most, in the loss that is trained."""

import json
from pathlib import Path

import pytest
import torch

from lorakit.core.attach import Adapted
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.train.config import TrainConfig
from lorakit.train.dataset import TrainData
from lorakit.train.distributed import world
from lorakit.train.expected import expected
from lorakit.train.memory import MemoryEstimate, estimate
from lorakit.train.train import build
from tests.train.runs import config

CPU = torch.device("cpu")


def built(settings: TrainConfig) -> tuple[Adapted, TrainData]:
    parts = build(settings, world(), quiet=True)
    return parts.adapted, parts.data


def traced(adapted: Adapted, data: TrainData, numbers: list[int]) -> MemoryEstimate:
    batch = data.train.collate([data.train.items[k] for k in numbers])
    return estimate(adapted.model, batch, optimizer=AdamW().rule)


def test_it_is_that_of_the_longest_items(tmp_path: Path) -> None:
    settings = config(tmp_path, packing=False, max_length=256, per_device_train_batch_size=3)
    adapted, data = built(settings)
    order = sorted(range(len(data.train.items)), key=lambda k: -len(data.train.items[k].input_ids))
    found = expected(adapted, data, settings, CPU)
    assert found == traced(adapted, data, order[:3])
    assert found.activations > traced(adapted, data, order[-3:]).activations
    assert adapted.model.training is False, "nothing is left behind"


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_answers_to_other_prompts_keep_no_activations(tmp_path: Path, task: str) -> None:
    """Of KTO's batch one half is only scored; of DPO's both are learned from."""
    rows = [{"prompt": f"p{i}", "chosen": "c" * 40, "rejected": "r" * 40} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = config(tmp_path, train_data=str(tmp_path / "rows.jsonl"), task=task, per_device_train_batch_size=4)
    adapted, data = built(settings)
    whole = traced(adapted, data, data.train.longest()[:4].tolist()).activations
    share = expected(adapted, data, settings, CPU).activations / whole
    assert share == 1 if task == "dpo" else 0.4 < share < 0.6
