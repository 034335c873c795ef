"""Text, chat, pair and classify rows -> encoded samples of at most max_length tokens.

text       longer texts become several samples; no token is lost; a text of one token predicts nothing and is dropped
chat,      longer ones lose their end; where no trained token would be left, the row is dropped
pair
classify   longer texts lose their end (see `tokenize_classes`)
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorakit.data.account import Counts
from lorakit.data.chat import Chats, TrainOn
from lorakit.data.encoded import (
    IGNORED,
    Closing,
    Encoded,
    Labeled,
    encode_pairs,
    encode_texts,
    encode_translations,
    eos_id,
    token_ids,
)
from lorakit.data.row import Row, kind_of
from lorakit.data.samples import Samples
from lorakit.data.tokenized import How, Label, Rules, Tokenized, Tokenizing, number_of, shape_among, tokenized


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    chat_template: str | None = None,
    encoder_decoder: bool = False,
    skip_bad: bool = False,
    how: How | None = None,
) -> Tokenized[Encoded]:
    """Samples of text, chat or pair rows, in the rows' order.

    Args:
        max_length: most tokens of a sample, at least 2.
        train_on, chat_template: for chat rows, see `encode_chat`; of a pair, "all" is the prompt, too.
        encoder_decoder: for models such as T5: pair rows only, the prompt encoded and the completion decoded.
        skip_bad: count and name rows that cannot be tokenized; else the first is an error.
        how: in how many processes, and what is known of the rows.

    DataError if no row leaves anything to learn.
    """
    if encoder_decoder:
        shape = shape_among(rows, ["pair"], "expected {prompt, completion} rows")
    else:
        shape = shape_among(rows, ["text", "chat", "pair"], "expected text, chat or pair rows")
    rules = Rules(shape, max_length, train_on, chat_template, encoder_decoder, skip_bad=skip_bad)
    return tokenized(Texts(tokenizer, rules), rows, how)


def tokenize_classes(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    classes: Sequence[Label],
    *,
    max_length: int,
    skip_bad: bool = False,
    how: How | None = None,
) -> Tokenized[Labeled]:
    """Samples of {text, label} rows; a label's number is its place in `classes` (see `class_names`)."""
    shape_among(rows, ["classify"], "classification needs {text, label} rows")
    rules = Rules("classify", max_length, classes=tuple(classes), skip_bad=skip_bad)
    return tokenized(Classes(tokenizer, rules), rows, how)


def class_names(rows: Iterable[Row]) -> list[Label]:
    """The distinct labels, integers in order and before strings in order."""
    return sorted({row["label"] for row in rows}, key=lambda label: (isinstance(label, str), label))


def chunks(sample: Encoded, max_length: int) -> list[Encoded]:
    """The sample in consecutive pieces of max_length; the last two are evened out where the last would be a lone token."""
    n = len(sample.input_ids)
    cuts = [*range(0, n, max_length), n]
    if n > max_length and n % max_length == 1:
        cuts[-2] -= 1
    return [replace(sample, input_ids=sample.input_ids[a:b], labels=sample.labels[a:b]) for a, b in pairwise(cuts)]


def trained_bytes(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Any], *, shifted: bool) -> int:
    """UTF-8 bytes of the tokens that the loss predicts (special tokens stand for none)."""
    skip = 1 if shifted else 0
    labels = [np.asarray(s.labels[skip:], dtype=np.int64) for s in samples]
    kept = [row[row != IGNORED] for row in labels]  # arrays, whose entries Transformers does not look at one by one
    return sum(len(text.encode()) for text in tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Texts(Tokenizing):
    """Text, chat and pair rows."""

    def check(self) -> None:
        """DataError without a chat template, or without an EOS."""
        super().check()
        if self.rules.shape == "chat":
            _ = self._chats
        else:
            eos_id(self.tokenizer)

    def some(self, rows: Sequence[Row]) -> tuple[list[Encoded], Counts]:
        """Cut in pieces (texts), or at the limit."""
        closing = Closing()
        whole = self._whole(rows, closing)
        whole = [one if (kind := kind_of(row)) is None else replace(one, kind=kind) for one, row in zip(whole, rows, strict=True)]
        samples, counts = (self._chunked if self.rules.shape == "text" else self._truncated)(whole)
        blind = sum(self._chats.blind(row["messages"], row.get("tools")) for row in rows) if self.rules.shape == "chat" else 0
        of_rows = Counts(rows=len(rows), appended=closing.appended, spelled=closing.spelled, blind=blind)
        return samples, counts + self._of_rows(whole) + of_rows

    def tokens(self, samples: Samples[Any], made: list[Any]) -> Counts:
        """With the bytes that trained tokens stand for."""
        return replace(super().tokens(samples, made), n_bytes=trained_bytes(self.tokenizer, made, shifted=samples.layout != "target"))

    def _whole(self, rows: Sequence[Row], closing: Closing) -> list[Encoded]:
        tokenizer, rules = self.tokenizer, self.rules
        if rules.shape == "text":
            return encode_texts(tokenizer, [row["text"] for row in rows], closing=closing)
        if rules.shape == "chat":
            return self._chats.encode([row["messages"] for row in rows], [row.get("tools") for row in rows])
        pairs = [(row["prompt"], row["completion"]) for row in rows]
        if rules.encoder_decoder:
            return encode_translations(tokenizer, pairs, closing=closing)
        return encode_pairs(tokenizer, pairs, learn_prompt=rules.train_on == "all", closing=closing)

    @cached_property
    def _chats(self) -> Chats:
        return Chats(self.tokenizer, self.rules.train_on, self.rules.chat_template)

    @cached_property
    def _special(self) -> frozenset[int]:
        known = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset({*known, *self.tokenizer.all_special_ids})

    def _chunked(self, whole: list[Encoded]) -> tuple[list[Encoded], Counts]:
        kept = [one for one in whole if self.learns(one)]
        samples = [piece for one in kept for piece in chunks(one, self.rules.max_length)]
        longer = sum(len(one.input_ids) > self.rules.max_length for one in kept)
        return samples, Counts(chunked=longer, dropped=len(whole) - len(kept))

    def _truncated(self, whole: list[Encoded]) -> tuple[list[Encoded], Counts]:
        kept = [one for one in whole if self.learns(one)]
        beyond = [self.beyond(one) for one in kept]
        dropped = len(whole) - len(kept)
        return [self.cut(one) for one in kept], Counts(truncated=sum(map(bool, beyond)), cut=sum(beyond), dropped=dropped)

    def _of_rows(self, whole: list[Encoded]) -> Counts:
        """What is counted by row, before anything is cut."""
        first = self.rules.first
        untaught = sum(all(label == IGNORED for label in one.labels[first:]) for one in whole)
        closed = sum(not self._special.isdisjoint(one.labels[first:]) for one in whole) if self.rules.shape == "chat" else 0
        return Counts(untaught=untaught, closed=closed) + begins(self.tokenizer, [one.input_ids for one in whole])


class Classes(Tokenizing):
    """Classify rows."""

    def some(self, rows: Sequence[Row]) -> tuple[list[Labeled], Counts]:
        """Cut where the tokenizer cuts."""
        number = {label: i for i, label in enumerate(self.rules.classes)}
        limit, tokenizer = self.rules.max_length, self.tokenizer
        numbers = [number_of(row["label"], number, "label") for row in rows]
        whole = token_ids(tokenizer, [row["text"] for row in rows], special=True)
        long = [i for i, ids in enumerate(whole) if len(ids) > limit]
        if long:  # the tokenizer truncates by itself, since it keeps a closing [SEP]
            short = token_ids(tokenizer, [rows[i]["text"] for i in long], special=True, truncation=True, max_length=limit)
            cut = sum(len(whole[i]) for i in long) - sum(map(len, short))
            for i, ids in zip(long, short, strict=True):
                whole[i] = ids
        samples = [Labeled(ids, label, kind_of(row)) for ids, label, row in zip(whole, numbers, rows, strict=True)]
        return samples, Counts(rows=len(rows), truncated=len(long), cut=cut if long else 0) + begins(tokenizer, whole)


def begins(tokenizer: PreTrainedTokenizerBase, whole: Sequence[Sequence[int]]) -> Counts:
    """How many sequences begin with BOS, and with two."""
    bos = tokenizer.bos_token_id
    return Counts(bos=sum(list(ids[:1]) == [bos] for ids in whole), twice=sum(list(ids[:2]) == [bos, bos] for ids in whole))
