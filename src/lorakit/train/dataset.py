"""Rows -> items that a step takes, and items -> batches: packed windows, padded samples, or classified texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError
from lorakit.data.account import Account
from lorakit.data.encoded import Labeled
from lorakit.data.pack import Windows, collate, pack
from lorakit.data.pad import n_tokens, n_tokens_both, pad
from lorakit.data.preference import Pairs, Ratings, collate_feedback, collate_preferences, tokenize_answers
from lorakit.data.row import Row, data_hash
from lorakit.data.samples import Samples
from lorakit.data.tag import tokenize_tags
from lorakit.data.tokenize import tokenize_classes, tokenize_rows
from lorakit.data.tokenized import How, Tokenized
from lorakit.train.config import TrainConfig
from lorakit.train.preference import DPO, KTO, Aim
from lorakit.train.rows import Rows
from lorakit.train.tagging import TagJudge

Batch = dict[str, Any]
Judge = Callable[..., dict[str, float]]
"""(model, batches, world, adapted) -> figures."""


@dataclass(frozen=True)
class Side:
    """Items of one side of the data, how they become a batch, and the UTF-8 bytes that their trained tokens stand for (0 for classes)."""

    items: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    n_bytes: int
    account: str
    length: Callable[[Any], int] = n_tokens
    """How much room an item takes in a batch: items of similar length are batched together."""
    fill: Callable[[Sequence[Any]], Batch] | None = None
    """How they become a batch of one and the same length; None where only padding could make it so."""
    aim: Aim | None = None
    """The training loss, where it compares the model with a reference."""
    judge: Judge | None = None
    """Held-out figures, where they are not those of texts or of classes."""

    details: Account | None = None
    """The account at length: which rules met how many rows and tokens."""
    notes: tuple[str, ...] = ()
    """What a user should know of it."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Each item's `length`. Items that lie on disk are not made for it."""
        if isinstance(self.items, Samples | Windows | Pairs | Ratings):
            return self.items.lengths
        return np.fromiter(map(self.length, self.items), dtype=np.int64)

    def longest(self) -> NDArray[np.int64]:
        """The items' numbers from the longest to the shortest, equals in order."""
        return np.argsort(-self.lengths, kind="stable")

    def batches(self, size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The items from the longest to the shortest, each once, split over ranks."""
        mine = self.longest()[rank::world].tolist()
        for start in range(0, len(mine), size):
            yield self.collate([self.items[k] for k in mine[start : start + size]])


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

    @property
    def notes(self) -> list[str]:
        """What a user should know of the data, of every task and both sides."""
        return list(dict.fromkeys(note for task in self.tasks for side in (task.train, task.valid) for note in side.notes))

    def filled(self) -> "TrainData":
        """The same with training batches of one length, where there is one: what a compiled model takes."""
        side = self.train if self.train.fill is None else replace(self.train, collate=self.train.fill)
        return replace(self, train=side, later=tuple(task.filled() for task in self.later))


@dataclass(frozen=True)
class Making:
    """What a side's items are made with."""

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    labels: list[Any]
    packing: bool
    encoder_decoder: bool
    how: How = field(default_factory=How)
    """In how many processes, and what is known of the rows."""


def prepare(
    rows: Rows,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    packing: bool,
    encoder_decoder: bool = False,
    quiet: bool = False,
) -> TrainData:
    """Tokenize, pack or pad: what `MAKERS` says for the task. `quiet`: show no progress."""
    making = Making(config, tokenizer, rows.labels, packing, encoder_decoder)
    hashes, sides = [Hash(rows.train), Hash(rows.valid)], []
    for name, side, of in zip(("train", "eval"), (rows.train, rows.valid), hashes, strict=True):
        how = How(config.preprocessing_num_workers, lambda of=of: of.value, quiet, f"tokenizing ({name})")  # type: ignore[misc]
        sides.append(MAKERS[rows.task](side, replace(making, how=how)))
    train, valid = sides
    return TrainData(train, valid, rows.task, rows.labels, hashes[0].value)


@dataclass(frozen=True)
class Hash:
    """The rows' `data_hash`, computed once and when it is asked for."""

    rows: Sequence[Row]

    @cached_property
    def value(self) -> str:
        """64 hexadecimal digits."""
        return data_hash(self.rows)


def check_vocabulary(data: TrainData, rows: int, model: str) -> None:
    """DataError unless every token has one of the `rows` of the model's embedding."""
    known = [side.details for task in data.tasks for side in (task.train, task.valid)]
    largest = max((account.counts.largest for account in known if account is not None), default=-1)
    if largest >= rows:
        raise DataError(
            f"the tokenizer made token {largest} and the embedding of {model} has {rows} rows: they do not belong together; "
            "give a model folder with its own tokenizer, or enlarge the model (resize_token_embeddings) and save both"
        )


def _noted(done: Tokenized[Any]) -> tuple[str, ...]:
    return (*done.notes, *(() if done.account is None else done.account.notes()))


def _classes(rows: Sequence[Row], making: Making) -> Side:
    config = making.config
    done = tokenize_classes(making.tokenizer, rows, making.labels, max_length=config.max_length, skip_bad=config.skip_bad, how=making.how)
    padded: Callable[..., Batch] = partial(pad, pad_id=_pad_id(making.tokenizer))
    if making.encoder_decoder and making.tokenizer.eos_token_id is not None:  # it answers at the EOS, which not all tokenizers write
        padded = partial(_closed, padded, int(making.tokenizer.eos_token_id))
    return Side(done.samples, padded, 0, str(done), details=done.account, notes=_noted(done))


def _closed(padded: Callable[..., Batch], eos: int, items: Sequence[Labeled]) -> Batch:
    return padded([item if eos in item.input_ids else replace(item, input_ids=[*item.input_ids, eos]) for item in items])


def _language(rows: Sequence[Row], making: Making) -> Side:
    config, tokenizer, encoder_decoder = making.config, making.tokenizer, making.encoder_decoder
    done = tokenize_rows(
        tokenizer, rows, max_length=config.max_length, train_on=config.train_on, encoder_decoder=encoder_decoder,
        skip_bad=config.skip_bad, how=making.how,
    )  # fmt: skip
    assert done.account is not None
    n_bytes, notes = done.account.counts.n_bytes, _noted(done)
    if not making.packing or encoder_decoder:
        length = n_tokens_both if encoder_decoder else n_tokens
        padded = partial(pad, pad_id=_pad_id(tokenizer))
        return Side(done.samples, padded, n_bytes, str(done), length, details=done.account, notes=notes)
    windows = pack(done.samples, config.max_length)
    account = f"{done}, packed into {len(windows)} windows of {config.max_length}"
    made = partial(collate, pad_id=_pad_id(tokenizer))
    details = replace(done.account, windows=len(windows))
    return Side(windows, made, n_bytes, account, fill=partial(made, length=config.max_length), details=details, notes=notes)


def _tags(rows: Sequence[Row], making: Making) -> Side:
    config = making.config
    done = tokenize_tags(making.tokenizer, rows, making.labels, max_length=config.max_length, skip_bad=config.skip_bad, how=making.how)
    judge = TagJudge(tuple(map(str, making.labels)))
    padded = partial(pad, pad_id=_pad_id(making.tokenizer))
    return Side(done.samples, padded, 0, str(done), judge=judge, details=done.account, notes=_noted(done))


def _compared(collate: Callable[..., Batch], aim: type[Aim], rows: Sequence[Row], making: Making) -> Side:
    config = making.config
    done = tokenize_answers(
        making.tokenizer, rows, max_length=config.max_length, encoder_decoder=making.encoder_decoder, skip_bad=config.skip_bad,
        how=making.how,
    )  # fmt: skip
    loss = aim.of(config)
    made, details, notes = partial(collate, pad_id=_pad_id(making.tokenizer)), done.account, _noted(done)
    return Side(done.samples, made, 0, str(done), aim=loss, judge=loss.judge, details=details, notes=notes)


MAKERS: dict[str, Callable[[Sequence[Row], Making], Side]] = {
    "causal-lm": _language,
    "sequence-classification": _classes,
    "token-classification": _tags,
    "dpo": partial(_compared, collate_preferences, DPO),
    "kto": partial(_compared, collate_feedback, KTO),
}
"""Task -> how one side's rows become its items."""


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id or 0)
