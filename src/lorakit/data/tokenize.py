"""Rows -> encoded samples of at most max_length tokens, with an account of everything that had to be cut.

text       longer texts become several samples; no token is lost; a text of one token predicts nothing and is dropped
chat,      longer ones lose their end; where no trained token would be left, the row is dropped
pair
classify   longer texts lose their end (see `tokenize_classes`)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError, did_you_mean
from lorakit.data.chat import TrainOn, encode_chat
from lorakit.data.encoded import IGNORED, Encoded, Labeled, encode_pair, encode_text, encode_translation
from lorakit.data.row import Row, kind_of, shape_of

Sample = TypeVar("Sample", Encoded, Labeled)
Label = str | int


@dataclass(frozen=True)
class Tokenized(Generic[Sample]):
    """Samples, and how many of the `rows` were chunked (texts), truncated, or dropped (nothing to learn within the limit)."""

    samples: list[Sample]
    rows: int
    chunked: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        counts = {"cut into chunks": self.chunked, "truncated": self.truncated, "dropped, no trained token left": self.dropped}
        cut = [f"{count} {what}" for what, count in counts.items() if count]
        return f"{len(self.samples)} samples from {self.rows} rows" + (f" ({', '.join(cut)})" if cut else "")


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    chat_template: str | None = None,
    encoder_decoder: bool = False,
) -> Tokenized[Encoded]:
    """Samples of text, chat or pair rows, in the rows' order.

    Args:
        max_length: most tokens of a sample, at least 2.
        train_on, chat_template: for chat rows, see `encode_chat`.
        encoder_decoder: for models such as T5: pair rows only, the prompt encoded and the completion decoded.

    DataError if no row leaves anything to learn.
    """
    _check(rows, max_length)
    shape = shape_of(rows[0])
    if shape == "classify" or (encoder_decoder and shape != "pair"):
        raise DataError(
            f"these rows are {shape} data; expected {'{prompt, completion} rows' if encoder_decoder else 'text, chat or pair rows'}"
        )
    if shape == "text":
        return _tokenize_texts(tokenizer, rows, max_length)
    if shape == "chat":
        whole = [encode_chat(tokenizer, row["messages"], train_on=train_on, chat_template=chat_template) for row in rows]
    else:
        encode = encode_translation if encoder_decoder else encode_pair
        whole = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    whole = [replace(one, kind=kind_of(row)) for one, row in zip(whole, rows, strict=True)]
    return _truncate(whole, max_length, first=0 if encoder_decoder else 1)


def tokenize_classes(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], classes: Sequence[Label], *, max_length: int
) -> Tokenized[Labeled]:
    """Samples of {text, label} rows; a label's number is its place in `classes` (see `class_names`)."""
    _check(rows, max_length)
    if shape_of(rows[0]) != "classify":
        raise DataError(f"these rows are {shape_of(rows[0])} data; classification needs {{text, label}} rows")
    number = {label: i for i, label in enumerate(classes)}
    samples, truncated = [], 0
    for row in rows:
        ids = tokenizer(row["text"], verbose=False)["input_ids"]
        if len(ids) > max_length:
            ids = tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"]  # keeps a closing [SEP]
            truncated += 1
        samples.append(Labeled(list(ids), _number(row["label"], number), kind_of(row)))
    return Tokenized(samples, len(rows), truncated=truncated)


def class_names(rows: Iterable[Row]) -> list[Label]:
    """The distinct labels, integers in order and before strings in order."""
    return sorted({row["label"] for row in rows}, key=lambda label: (isinstance(label, str), label))


def _number(label: Label, number: dict[Label, int]) -> int:
    if label not in number:
        raise DataError(f"the label {label!r} is not among the classes. {did_you_mean(str(label), map(str, number))}".rstrip())
    return number[label]


def _check(rows: Sequence[Row], max_length: int) -> None:
    if not rows:
        raise DataError("there are no rows to tokenize")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; expected at least 2, as a lone token predicts nothing")


def _tokenize_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int) -> Tokenized[Encoded]:
    whole = [replace(encode_text(tokenizer, row["text"]), kind=kind_of(row)) for row in rows]
    kept = _kept(whole, max_length)
    samples = [piece for one in kept for piece in chunks(one, max_length)]
    return Tokenized(samples, len(rows), chunked=sum(len(one.input_ids) > max_length for one in kept), dropped=len(rows) - len(kept))


def chunks(sample: Encoded, max_length: int) -> list[Encoded]:
    """The sample in consecutive pieces of max_length; the last two are evened out where the last would be a lone token."""
    n = len(sample.input_ids)
    cuts = [*range(0, n, max_length), n]
    if n > max_length and n % max_length == 1:
        cuts[-2] -= 1
    return [replace(sample, input_ids=sample.input_ids[a:b], labels=sample.labels[a:b]) for a, b in pairwise(cuts)]


def _truncate(whole: list[Encoded], max_length: int, *, first: int) -> Tokenized[Encoded]:
    """Cut ends off; `first` is the first label that is predicted: 1 where labels are shifted, 0 for an encoder-decoder."""
    cut = [replace(one, input_ids=one.input_ids[:max_length], labels=one.labels[:max_length]) for one in whole]
    kept = _kept(cut, max_length, first=first)
    longer = sum(max(len(one.input_ids), len(one.labels)) > max_length for one in whole if _learns(one, max_length, first=first))
    return Tokenized(kept, len(whole), truncated=longer, dropped=len(whole) - len(kept))


def _kept(samples: list[Encoded], max_length: int, *, first: int = 1) -> list[Encoded]:
    kept = [one for one in samples if _learns(one, max_length, first=first)]
    if not kept:
        raise DataError(
            f"none of the {len(samples)} rows has a trained token within max_length={max_length}; raise it or shorten the prompts"
        )
    return kept


def _learns(sample: Encoded, max_length: int, *, first: int) -> bool:
    return any(label != IGNORED for label in sample.labels[first:max_length])
