"""Sides of the data: items are made when a batch is, and what a run needs to know of all of them is known without."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.core.errors import DataError
from lorakit.data import tokenized
from lorakit.data.pad import n_tokens, n_tokens_both
from lorakit.data.samples import Samples
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.data.token_cache import TokenCache
from lorakit.train.config import TrainConfig
from lorakit.train.dataset import Side, TrainData, check_vocabulary, prepare
from lorakit.train.rows import read_rows
from lorakit.train.source_model import load_tokenizer
from lorakit.train.train import train
from tests.train.runs import class_file, config
from tests.train.test_stream import ragged, steps


def made(settings: TrainConfig, **options: Any) -> TrainData:
    return prepare(read_rows(settings), settings, load_tokenizer(settings.model), **{"packing": False, **options})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(np.array_equal(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other))


@pytest.mark.parametrize("packing", [True, False])
def test_batches_are_those_of_a_list_of_items(tmp_path: Path, packing: bool) -> None:
    """In training and in evaluation, of items in memory and on disk."""
    settings = ragged(tmp_path)
    side = made(settings, packing=packing).train
    listed = replace(side, items=list(side.items))
    sorted_ = sorted(listed.items, key=n_tokens, reverse=True)
    assert [len(b["input_ids"]) for b in side.batches(4)][:-1] == [4] * (len(sorted_) // 4 - (len(sorted_) % 4 == 0))
    assert all(same(a, side.collate(sorted_[4 * k : 4 * k + 4])) for k, a in enumerate(side.batches(4)))
    assert all(map(same, steps(side, settings, 20), steps(listed, settings, 20)))
    two = [b for rank in range(2) for b in side.batches(4, rank=rank, world=2)]
    assert sum(len(b["input_ids"]) for b in two) == len(sorted_)


def test_lengths_are_known_without_making_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ragged(tmp_path)
    sides = [made(settings, packing=packing).train for packing in (True, False)]
    monkeypatch.setattr(Samples, "__getitem__", lambda *_: pytest.fail("an item was made"))
    for side in sides:
        assert len(side.lengths) == len(side.items) == len(side.longest())


def test_an_encoder_decoder_s_item_counts_both_sides(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f'{{"prompt": "{"a" * i}", "completion": "{"b" * (30 - i)}"}}\n' for i in range(1, 30)))
    side = made(config(tmp_path, train_data=str(data)), encoder_decoder=True).train
    assert side.lengths.tolist() == [n_tokens_both(item) for item in side.items]


def test_a_run_from_the_cache_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for name in ("memory", "first", "second"):
        if name != "memory":
            monkeypatch.setattr(tokenized, "LARGE", 1)
            monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
        result = train(config(tmp_path, output_dir=str(tmp_path / name)), quiet=True)
        losses.append(result.final["loss"])
    assert losses[0] == losses[1] == losses[2]
    cache = TokenCache.here()
    assert cache is not None
    assert len([f for f in cache.root.iterdir() if f.is_dir()]) == 2  # train and eval


def test_a_vocabulary_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    tiny_model("llama", vocab_size=100).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(DataError, match=r"made token 1\d\d and the embedding of .*small has 100 rows: they do not belong together"):
        train(config(tmp_path, model=str(folder)), quiet=True)
    data = made(config(tmp_path))
    check_vocabulary(data, 286, "it")
    for name, row in (
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("kto", {"prompt": "a", "completion": "b", "label": True}),
        ("tags", {"tokens": ["a", "b"], "tags": ["x", "y"]}),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row | {"n": i}) + "\n" for i in range(40)))
        with pytest.raises(DataError, match="they do not belong together"):
            check_vocabulary(made(config(tmp_path, train_data=str(file))), 5, "it")


def test_notes_of_the_data_are_the_run_s(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f'{{"prompt": "a", "completion": "{"b" * 200}{i}"}}\n' for i in range(30)))
    result = train(config(tmp_path, train_data=str(data), max_length=32, max_steps=1), quiet=True)
    assert any("are longer than max_length=32, and lose their ends; raise it" in note for note in result.notes)
    assert made(config(tmp_path, train_data=class_file(tmp_path / "c.jsonl"))).notes == []


def test_items_may_be_any_list() -> None:
    side = Side(["aa", "b", "cccc"], list, 0, "", len)
    assert side.lengths.tolist() == [2, 1, 4]
    assert list(side.batches(2)) == [["cccc", "aa"], ["b"]]
