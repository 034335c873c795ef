"""What a step's micro-batches hold: little padding, and the same samples however they are divided among processes."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.train.config import TrainConfig
from lorakit.train.dataset import Side, prepare
from lorakit.train.distributed import World
from lorakit.train.rows import read_rows
from lorakit.train.source_model import load_tokenizer
from lorakit.train.stream import Stream
from tests.train.runs import class_file, config, text_file


def sides(settings: TrainConfig, *, packing: bool = False, encoder_decoder: bool = False) -> tuple[Side, Side]:
    data = prepare(read_rows(settings), settings, load_tokenizer(settings.model), packing=packing, encoder_decoder=encoder_decoder)
    return data.train, data.valid


def steps(side: Side, settings: TrainConfig, count: int, rank: int = 0, world: int = 1) -> list[list[dict[str, Any]]]:
    return list(islice(Stream(side, settings, World(rank, world, torch.device("cpu"), False), 0.0, 1.0), count))


def padded(batches: Any, key: str = "attention_mask") -> float:
    """The share of places that hold no token, counted in the tensors themselves."""
    masks = [batch[key] if key == "attention_mask" else batch[key] >= 0 for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def rows_of(step: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The samples of a step, without their padding."""
    return sorted(
        tuple(ids[mask.bool()].tolist()) for batch in step for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def ragged(tmp: Path, **keys: Any) -> TrainConfig:
    return config(tmp, train_data=text_file(tmp / "many.jsonl", lines=150), max_length=256, **keys)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_samples_that_cannot_be_packed_are_batched_by_length(tmp_path: Path, accumulation: int) -> None:
    """Counted over two epochs; switched off, the draw is blind."""
    keys = {"packing": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    shares = []
    for grouping in (True, False):
        settings = ragged(tmp_path, **keys, group_by_length=grouping)
        train, _ = sides(settings)
        done = steps(train, settings, 2 * len(train.items) // (4 * accumulation))
        assert all([len(batch["input_ids"]) for batch in step] == [4] * accumulation for step in done)
        shares.append(padded(batch for step in done for batch in step))
    assert shares[0] < 0.1 < 0.25 < shares[1]


def test_grouping_is_the_default(tmp_path: Path) -> None:
    assert ragged(tmp_path).group_by_length


def test_a_step_holds_the_same_samples_on_one_process_and_on_several(tmp_path: Path) -> None:
    """One process accumulates what four hold at once; ranks that wait for each other have batches of about the same width."""
    alone = ragged(tmp_path, packing=False, gradient_accumulation_steps=4)
    train, _ = sides(alone)
    shared = alone.model_copy(update={"gradient_accumulation_steps": 1})
    ranks = [steps(train, shared, 20, rank, 4) for rank in range(4)]
    for i, step in enumerate(steps(train, alone, 20)):
        assert rows_of(step) == rows_of([batch for rank in ranks for batch in rank[i]])
    widths = [[rank[i][0]["input_ids"].shape[1] for rank in ranks] for i in range(20)]
    assert sum(max(w) for w in widths) < 1.2 * sum(min(w) for w in widths)


def test_classes_and_held_out_samples_are_batched_by_length(tmp_path: Path) -> None:
    settings = config(tmp_path, train_data=class_file(tmp_path / "classes.jsonl", 200), per_device_train_batch_size=8)
    train, valid = sides(settings)
    done = steps(train, settings, len(train.items) // 8)
    assert padded(batch for step in done for batch in step) < 0.12
    held_out = list(valid.batches(4))
    assert padded(held_out) < 0.12
    apart = [batch for rank in range(2) for batch in valid.batches(4, rank=rank, world=2)]
    assert rows_of(held_out) == rows_of(apart) == sorted(tuple(item.input_ids) for item in valid.items)


def test_an_encoder_decoder_s_targets_count_too(tmp_path: Path) -> None:
    """Inputs of one length and ragged targets."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(f'{{"prompt": "say", "completion": "{"ab " * (1 + 11 * i % 29)}"}}\n' for i in range(160)), encoding="utf-8")
    settings = config(tmp_path, train_data=str(rows), max_length=256, per_device_train_batch_size=8)
    train, _ = sides(settings, encoder_decoder=True)
    done = steps(train, settings, len(train.items) // 8)
    assert padded((batch for step in done for batch in step), "labels") < 0.1


def test_packed_windows_are_grouped_too(tmp_path: Path) -> None:
    """Whatever is short shares a batch: the windows of one epoch, filled to the longest of each batch."""
    settings = ragged(tmp_path, per_device_train_batch_size=8)
    blind = settings.model_copy(update={"group_by_length": False})
    train, _ = sides(settings, packing=True)
    held = sum(len(window.input_ids) for window in train.items)

    def places(c: TrainConfig) -> int:
        return sum(batch["input_ids"].numel() for step in steps(train, c, len(train.items) // 8) for batch in step)

    assert held / places(settings) > held / places(blind)
