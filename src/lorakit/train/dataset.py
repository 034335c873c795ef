"""Rows -> items that a step takes, and items -> batches: packed windows, padded samples, or classified texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.pack import collate, pack
from lorakit.data.pad import n_tokens, n_tokens_both, pad
from lorakit.data.row import Row, data_hash
from lorakit.data.tokenize import tokenize_classes, tokenize_rows
from lorakit.train.config import TrainConfig
from lorakit.train.rows import Rows

Batch = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """Items of one side of the data, how they become a batch, and the UTF-8 bytes that their trained tokens stand for (0 for classes)."""

    items: list[Any]
    collate: Callable[[Sequence[Any]], Batch]
    n_bytes: int
    account: str
    length: Callable[[Any], int] = n_tokens
    """How much room an item takes in a batch: items of similar length are batched together."""
    fill: Callable[[Sequence[Any]], Batch] | None = None
    """How they become a batch of one and the same length; None where only padding could make it so."""

    def batches(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The items from the longest to the shortest, each once, split over ranks."""
        mine = sorted(self.items, key=self.length, reverse=True)[rank::world]
        for start in range(0, len(mine), size):
            yield self.collate(mine[start : start + size])


@dataclass(frozen=True)
class TrainData:
    """Both sides, the task, its labels (classification) and the hash of the training rows."""

    train: Side
    valid: Side
    task: str
    labels: list[Any]
    hash: str
    later: tuple["TrainData", ...] = ()
    """The tasks that follow this one in sequence."""

    @property
    def tasks(self) -> tuple["TrainData", ...]:
        """Every task, in order."""
        return (self, *self.later)

    def filled(self) -> "TrainData":
        """The same with training batches of one length, where there is one: what a compiled model takes."""
        side = self.train if self.train.fill is None else replace(self.train, collate=self.train.fill)
        return replace(self, train=side, later=tuple(task.filled() for task in self.later))


def prepare(
    rows: Rows, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, packing: bool, encoder_decoder: bool = False
) -> TrainData:
    """Tokenize, pack or pad."""
    if rows.task == "sequence-classification":
        train, valid = (_classes(side, rows.labels, config, tokenizer) for side in (rows.train, rows.valid))
    else:
        train, valid = (_language(side, config, tokenizer, packing, encoder_decoder) for side in (rows.train, rows.valid))
    return TrainData(train, valid, rows.task, rows.labels, data_hash(rows.train))


def _classes(rows: list[Row], labels: list[Any], config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Side:
    done = tokenize_classes(tokenizer, rows, labels, max_length=config.max_length)
    return Side(list(done.samples), lambda items: pad(items, _pad_id(tokenizer)), 0, str(done))


def _language(rows: list[Row], config: TrainConfig, tokenizer: PreTrainedTokenizerBase, packing: bool, encoder_decoder: bool) -> Side:
    done = tokenize_rows(tokenizer, rows, max_length=config.max_length, train_on=config.train_on, encoder_decoder=encoder_decoder)
    n_bytes = trained_bytes(tokenizer, done.samples, shifted=not encoder_decoder)
    if not packing or encoder_decoder:
        length = n_tokens_both if encoder_decoder else n_tokens
        return Side(list(done.samples), lambda items: pad(items, _pad_id(tokenizer)), n_bytes, str(done), length)
    windows = pack(done.samples, config.max_length)
    account = f"{done}, packed into {len(windows)} windows of {config.max_length}"
    made = partial(collate, pad_id=_pad_id(tokenizer))
    return Side(windows, made, n_bytes, account, fill=partial(made, length=config.max_length))


def trained_bytes(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Encoded], *, shifted: bool) -> int:
    """UTF-8 bytes of the tokens that the loss predicts (special tokens stand for none)."""
    skip = 1 if shifted else 0
    kept = [[t for t in s.labels[skip:] if t != IGNORED] for s in samples]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id or 0)
