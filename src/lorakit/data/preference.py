"""Preference and feedback rows -> encoded samples: the prompt carries no loss, the answers do.

preference  {prompt, chosen, rejected}    -> Preferred: two sequences that share the prompt's tokens
feedback    {prompt, completion, label}   -> Rated: a sequence, whether it is wanted, and the same prompt with another row's answer

Strings are tokenized apart and end in EOS, as `encode_pair` does; messages go through the chat template as one conversation, and the loss
is on what the answer's turns say. Longer sequences lose their end; a row of which one sequence keeps no trained token is dropped.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError
from lorakit.data.account import Counts
from lorakit.data.chat import Chats
from lorakit.data.encoded import IGNORED, Encoded, encode_pairs, encode_translations
from lorakit.data.pad import pad
from lorakit.data.row import KEYS, Row, canonical, kind_of
from lorakit.data.samples import Samples
from lorakit.data.tokenized import How, Rules, Tokenized, Tokenizing, shape_among, tokenized


@dataclass(frozen=True, slots=True)
class Preferred:
    """Two answers to one prompt."""

    chosen: Encoded
    rejected: Encoded

    @property
    def input_ids(self) -> list[int]:
        """The longer sequence's: what the pair counts in a batch."""
        return max(self.chosen.input_ids, self.rejected.input_ids, key=len)


@dataclass(frozen=True, slots=True)
class Rated:
    """An answer, whether it is wanted, and the prompt with an answer that was given to another (for KTO's estimate of the divergence)."""

    answer: Encoded
    desirable: bool
    mismatched: Encoded

    @property
    def input_ids(self) -> list[int]:
        """The answer's sequence."""
        return self.answer.input_ids


Item = TypeVar("Item", covariant=True)


class _Made(Sequence[Item]):
    """Items that are made when they are asked for."""

    @abstractmethod
    def item(self, k: int) -> Item:
        """The k-th, 0 <= k < len."""

    @overload
    def __getitem__(self, k: int) -> Item: ...
    @overload
    def __getitem__(self, k: slice) -> list[Item]: ...
    def __getitem__(self, k: int | slice) -> Item | list[Item]:
        places = range(len(self))[k]
        return self.item(places) if isinstance(places, int) else [self.item(i) for i in places]


class Pairs(_Made[Preferred]):
    """Preferred ones over samples [chosen, rejected, chosen, ..]."""

    def __init__(self, samples: Samples[Encoded]) -> None:
        self.samples = samples
        self.lengths = samples.lengths.reshape(-1, 2).max(-1)
        """What each counts in a batch: its longer sequence."""

    def __len__(self) -> int:
        return len(self.samples) // 2

    def item(self, k: int) -> Preferred:
        return Preferred(*self.samples[2 * k : 2 * k + 2])


class Ratings(_Made[Rated]):
    """Rated ones over marked samples, of at most `max_length` tokens.

    The mismatched answer is the next one's that has another prompt, so that two ratings of one prompt are no match of theirs; where all
    share a prompt, it is the next one's.
    """

    def __init__(self, samples: Samples[Encoded], max_length: int) -> None:
        assert samples.marks is not None
        self.samples, self.max_length = samples, max_length
        self.desirable: NDArray[np.bool_] = samples.marks % 2 == 1
        """Which are wanted, [n]."""
        self.lengths = samples.lengths
        """What each counts in a batch: the answer's sequence."""
        self._partners = _partners((samples.marks // 2).tolist())

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, k: int) -> Rated:
        one, other = self.samples[k], self.samples[self._partners[k]]
        return Rated(replace(one, mark=None), bool(self.desirable[k]), self._with_answer_of(one, other))

    def _with_answer_of(self, one: Encoded, other: Encoded) -> Encoded:
        """One's prompt and another's answer, cut at the limit, which leaves some of the answer."""
        if self.samples.layout == "target":
            return Encoded(one.input_ids, other.labels, one.kind)
        prompt, start = one.input_ids[: _first(one)], _first(other)
        ids, labels = prompt + other.input_ids[start:], [IGNORED] * len(prompt) + other.labels[start:]
        return Encoded(ids[: self.max_length], labels[: self.max_length], one.kind)


class _Compared(Tokenizing):
    """What both shapes share: a prompt without loss, and answers."""

    @cached_property
    def _chats(self) -> Chats:
        return Chats(self.tokenizer, chat_template=self.rules.chat_template)

    def _whole(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Encoded]:
        """Every row's answers under these keys, one row after the other, uncut, with labels on the answers alone."""
        said = [(row, row["prompt"], row[key]) for row in rows for key in answers]
        texts = [(prompt, answer) for _, prompt, answer in said if isinstance(prompt, str)]
        talks = [(row, prompt, answer) for row, prompt, answer in said if not isinstance(prompt, str)]
        if talks and self.rules.encoder_decoder:
            raise DataError("an encoder-decoder has no conversations; expected strings in prompt and answers")
        if not all(any(message["role"] == "assistant" for message in answer) for _, _, answer in talks):
            raise DataError("an answer of messages has no assistant message to learn from; give the answers the role assistant")
        encode = encode_translations if self.rules.encoder_decoder else encode_pairs
        of_texts = iter(encode(self.tokenizer, texts) if texts else [])
        messages = [[*({**message, "train": False} for message in prompt), *answer] for _, prompt, answer in talks]
        of_talks = iter(self._chats.encode(messages, [row.get("tools") for row, _, _ in talks]) if talks else [])
        return [replace(next(of_texts if isinstance(prompt, str) else of_talks), kind=kind_of(row)) for row, prompt, _ in said]

    def _of_rows(self, rows: Sequence[Row], kept: Sequence[Sequence[Encoded]]) -> Counts:
        """The counts of these rows; `kept`: the sequences of those that are left, uncut."""
        beyond = [sum(map(self.beyond, whole)) for whole in kept]
        parts = [key for key in KEYS[self.rules.shape] if key != "label"]
        talks = [row for row in rows if not isinstance(row["prompt"], str)]
        blind = sum(self._chats.blind([m for key in parts for m in row[key]], row.get("tools")) for row in talks)
        dropped = len(rows) - len(kept)
        return Counts(rows=len(rows), truncated=sum(map(bool, beyond)), cut=sum(beyond), dropped=dropped, blind=blind)


class _Preferences(_Compared):
    needs = "a trained token in both answers"

    def some(self, rows: Sequence[Row]) -> tuple[list[Encoded], Counts]:
        """[chosen, rejected, chosen, ..]. DataError where the prompt's tokens are not the same in both."""
        whole = self._whole(rows, ("chosen", "rejected"))
        pairs = list(zip(whole[::2], whole[1::2], strict=True))
        if not all(_shared(*map(self._prompt, pair)) for pair in pairs):
            raise DataError("the prompt's tokens differ before the two answers; give both answers the same first role")
        kept = [pair for pair in pairs if all(map(self.learns, pair))]
        return [self.cut(one) for pair in kept for one in pair], self._of_rows(rows, kept)

    def tokens(self, samples: Samples[Any], made: list[Any]) -> Counts:
        """A pair is one sample."""
        return replace(super().tokens(samples, made), samples=len(samples) // 2)

    def _prompt(self, sample: Encoded) -> list[int]:
        return sample.input_ids if self.rules.encoder_decoder else sample.input_ids[: _first(sample)]


class _Feedback(_Compared):
    def some(self, rows: Sequence[Row]) -> tuple[list[Encoded], Counts]:
        """The answers, marked."""
        whole = zip(self._whole(rows, ("completion",)), rows, strict=True)
        kept = [replace(one, mark=mark_of(row)) for one, row in whole if self.learns(one)]
        return [self.cut(one) for one in kept], self._of_rows(rows, [[one] for one in kept])


def tokenize_answers(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int,
    chat_template: str | None = None,
    encoder_decoder: bool = False,
    skip_bad: bool = False,
    how: How | None = None,
) -> Tokenized[Any]:
    """`Pairs` of preference rows, or `Ratings` of feedback rows, in their order.

    DataError if none is left, or if a template shows a pair's answers another prompt.
    """
    shape = shape_among(rows, ["preference", "feedback"], "expected preference or feedback rows")
    rules = Rules(shape, max_length, chat_template=chat_template, encoder_decoder=encoder_decoder, skip_bad=skip_bad)
    done: Tokenized[Any] = tokenized((_Preferences if shape == "preference" else _Feedback)(tokenizer, rules), rows, how)
    assert isinstance(done.samples, Samples)
    return replace(done, samples=Pairs(done.samples) if shape == "preference" else Ratings(done.samples, max_length))


def mark_of(row: Row) -> int:
    """Of a feedback row: twice a number of 56 bits that equal prompts share, and one more where the answer is wanted."""
    prompt = hashlib.blake2b(canonical({"prompt": row["prompt"]}).encode(), digest_size=7).digest()
    return 2 * int.from_bytes(prompt) + bool(row["label"])


def collate_preferences(items: Sequence[Preferred], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of 2 b rows as `pad` makes it: the chosen answers, then the rejected ones in the same order."""
    return pad([item.chosen for item in items] + [item.rejected for item in items], pad_id)


def collate_feedback(items: Sequence[Rated], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of 2 b rows as `pad` makes it: the answers, then the mismatched ones; and `desirable` [b], bool."""
    batch = pad([item.answer for item in items] + [item.mismatched for item in items], pad_id)
    return batch | {"desirable": torch.tensor([item.desirable for item in items])}


def rows_of(batch: Mapping[str, Any], where: slice) -> dict[str, Any]:
    """Some rows of a padded batch, without the columns that only the others need."""
    part = {key: value[where] for key, value in batch.items() if key != "desirable"}
    width = int(part["attention_mask"].sum(-1).max())
    targets = int((part["labels"] != IGNORED).nonzero()[:, 1].max()) + 1
    targets = max(width, targets) if part["labels"].shape == part["input_ids"].shape else targets  # or an encoder-decoder's
    return {key: value[:, : targets if key == "labels" else width] for key, value in part.items()}


def _first(sample: Encoded) -> int:
    """How many tokens stand before the answer."""
    return next((i for i, label in enumerate(sample.labels) if label != IGNORED), len(sample.labels))


def _shared(a: list[int], b: list[int]) -> bool:
    """Whether two answers follow the same prompt: a token at the border may have been joined with one of them."""
    n = min(len(a), len(b))
    return a == b or (abs(len(a) - len(b)) <= 1 and a[: n - 1] == b[: n - 1])


def _partners(prompts: Sequence[Any]) -> list[int]:
    """For each row the next one, in a circle, whose prompt is another; where there is none, the next."""
    n = len(prompts)
    found, other = [(i + 1) % n for i in range(n)], None
    for k in range(2 * n - 1, -1, -1):  # twice around, backward
        i, after = k % n, (k + 1) % n
        other = after if prompts[after] != prompts[i] else other
        found[i] = found[i] if other is None else other
    return found
