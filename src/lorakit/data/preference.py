"""Preference and feedback rows -> encoded samples: the prompt carries no loss, the answers do.

preference  {prompt, chosen, rejected}    -> Preferred: two sequences that share the prompt's tokens
feedback    {prompt, completion, label}   -> Rated: a sequence, whether it is wanted, and the same prompt with another row's answer

Strings are tokenized apart and end in EOS, as `encode_pair` does; messages go through the chat template as one conversation, and the loss
is on what the answer's turns say. Longer sequences lose their end; a row of which one sequence keeps no trained token is dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError
from lorakit.data.account import LISTED, account_of
from lorakit.data.chat import encode_chat
from lorakit.data.encoded import IGNORED, Encoded, encode_pair, encode_translation
from lorakit.data.pad import pad
from lorakit.data.row import Row, kind_of, shape_of
from lorakit.data.samples import Samples
from lorakit.data.tokenize import Tokenized, place_of, tokens_of


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


@dataclass(frozen=True)
class Encoder:
    """How prompt and answer become a sequence."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    chat_template: str | None = None
    encoder_decoder: bool = False

    def __call__(self, prompt: str | list[Any], answer: str | list[Any], kind: int | None) -> Encoded:
        """The whole sequence, uncut, with labels on the answer alone."""
        if isinstance(prompt, str) and isinstance(answer, str):
            encode = encode_translation if self.encoder_decoder else encode_pair
            return replace(encode(self.tokenizer, prompt, answer), kind=kind)
        if self.encoder_decoder:
            raise DataError("an encoder-decoder has no conversations; expected strings in prompt and answers")
        said: list[Any] = [*answer]
        if not any(message["role"] == "assistant" for message in said):
            raise DataError("an answer of messages has no assistant message to learn from; give the answers the role assistant")
        before = [{**message, "train": False} for message in prompt if isinstance(message, dict)]
        return replace(encode_chat(self.tokenizer, [*before, *said], chat_template=self.chat_template), kind=kind)

    def pair(self, row: Row) -> tuple[Encoded, Encoded]:
        """The chosen and the rejected sequence. DataError where the prompt's tokens are not the same in both."""
        chosen, rejected = (self(row["prompt"], row[side], kind_of(row)) for side in ("chosen", "rejected"))
        if not _shared(self.prompt_of(chosen), self.prompt_of(rejected)):
            raise DataError("the prompt's tokens differ before the two answers; give both answers the same first role")
        return chosen, rejected

    def cut(self, sample: Encoded) -> Encoded:
        """Without what is beyond the limit."""
        return replace(sample, input_ids=sample.input_ids[: self.max_length], labels=sample.labels[: self.max_length])

    def learns(self, sample: Encoded) -> bool:
        """Whether the loss reads any of it."""
        return any(label != IGNORED for label in sample.labels[0 if self.encoder_decoder else 1 :])

    def long(self, sample: Encoded) -> bool:
        """Whether it is beyond the limit."""
        return max(len(sample.input_ids), len(sample.labels)) > self.max_length

    def prompt_of(self, sample: Encoded) -> list[int]:
        """The tokens before the answer."""
        if self.encoder_decoder:
            return sample.input_ids
        first = next((i for i, label in enumerate(sample.labels) if label != IGNORED), len(sample.labels))
        return sample.input_ids[:first]

    def with_answer_of(self, sample: Encoded, other: Encoded) -> Encoded:
        """One's prompt and another's answer, cut so that some of the answer is left."""
        if self.encoder_decoder:
            return self.cut(replace(sample, labels=other.labels))
        prompt, start = self.prompt_of(sample), len(self.prompt_of(other))
        ids, labels = other.input_ids[start:], other.labels[start:]
        return self.cut(replace(sample, input_ids=prompt + ids, labels=[IGNORED] * len(prompt) + labels))


def tokenize_preferences(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int,
    chat_template: str | None = None,
    encoder_decoder: bool = False,
    skip_bad: bool = False,
) -> Tokenized[Any]:
    """`Preferred` samples of preference rows, in their order. DataError if none is left, or if a template shows the two another prompt."""
    encode = _encoder(rows, "preference", Encoder(tokenizer, max_length, chat_template, encoder_decoder))
    samples, kept = list[Preferred](), list[tuple[Encoded, ...]]()
    whole, bad = _whole(rows, encode.pair, skip_bad)
    for (chosen, rejected), _ in whole:
        pair = Preferred(encode.cut(chosen), encode.cut(rejected))
        if encode.learns(pair.chosen) and encode.learns(pair.rejected):
            samples.append(pair)
            kept.append((chosen, rejected))
    return _counted(samples, rows, encode, kept, bad)


def tokenize_feedback(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int,
    chat_template: str | None = None,
    encoder_decoder: bool = False,
    skip_bad: bool = False,
) -> Tokenized[Any]:
    """`Rated` samples of feedback rows, in their order. The mismatched answer is the next row's that has another prompt, so that two
    ratings of one prompt are no match of theirs; where all rows share a prompt, it is the next row's. DataError if no row is left."""
    encode = _encoder(rows, "feedback", Encoder(tokenizer, max_length, chat_template, encoder_decoder))
    whole, bad = _whole(rows, lambda row: encode(row["prompt"], row["completion"], kind_of(row)), skip_bad)
    kept = [(one, row) for one, row in whole if encode.learns(encode.cut(one))]
    samples = [
        Rated(encode.cut(one), row["label"], encode.with_answer_of(one, kept[j][0]))
        for (one, row), j in zip(kept, _partners([row["prompt"] for _, row in kept]), strict=True)
    ]
    return _counted(samples, rows, encode, [(one,) for one, _ in kept], bad)


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


def _encoder(rows: Sequence[Row], shape: str, encode: Encoder) -> Encoder:
    if not len(rows):
        raise DataError("there are no rows to tokenize")
    if (found := shape_of(rows[0])) != shape:
        raise DataError(f"these rows are {found} data; expected {shape} rows")
    return encode


def _shared(a: list[int], b: list[int]) -> bool:
    """Whether two answers follow the same prompt: a token at the border may have been joined with one of them."""
    n = min(len(a), len(b))
    return a == b or (abs(len(a) - len(b)) <= 1 and a[: n - 1] == b[: n - 1])


def _whole(rows: Sequence[Row], encode: Callable[[Row], Any], skip_bad: bool) -> tuple[list[tuple[Any, Row]], list[str]]:
    """What each row is as tokens, uncut, and what is wrong with those that are left out. DataError for the first unless `skip_bad`."""
    done, bad = list[tuple[Any, Row]](), list[str]()
    for i, row in enumerate(rows):
        try:
            done.append((encode(row), row))
        except DataError as error:
            said = f"{place_of(rows, i)}: {error}"
            if not skip_bad:
                raise DataError(said) from None
            bad.append(said)
    return done, bad


def _counted(
    samples: list[Any], rows: Sequence[Row], encode: Encoder, whole: Sequence[Sequence[Encoded]], bad: list[str]
) -> Tokenized[Any]:
    """With the account; `whole`: each sample's sequences, uncut."""
    if not samples:
        why = f", and {len(bad)} cannot be used: {bad[0]}" if bad else ""
        raise DataError(f"none of the {len(rows)} rows has a trained token in every answer within max_length={encode.max_length}{why}")
    both = encode.encoder_decoder
    uncut = sum(len(one.input_ids) + both * len(one.labels) for ones in whole for one in ones)
    cut = [encode.cut(one) for ones in whole for one in ones]
    tokens = tokens_of(encode.tokenizer, Samples.of(cut, "target" if both else "token"))
    counts = replace(
        tokens,
        rows=len(rows),
        samples=len(samples),
        truncated=sum(any(map(encode.long, ones)) for ones in whole),
        cut=uncut - tokens.tokens,
        trained=sum(label != IGNORED for one in cut for label in one.labels[0 if both else 1 :]),
        dropped=len(rows) - len(samples) - len(bad),
        bad=len(bad),
        named=tuple(bad[:LISTED]),
    )
    account = account_of(encode.tokenizer, counts, shape_of(rows[0]), encode.max_length, encoder_decoder=both)
    return Tokenized(samples, len(rows), truncated=counts.truncated, dropped=counts.dropped, bad=len(bad), account=account)


def _partners(prompts: Sequence[Any]) -> list[int]:
    """For each row the next one, in a circle, whose prompt is another; where there is none, the next."""
    n = len(prompts)
    found, other = [(i + 1) % n for i in range(n)], None
    for k in range(2 * n - 1, -1, -1):  # twice around, backward
        i, after = k % n, (k + 1) % n
        other = after if prompts[after] != prompts[i] else other
        found[i] = found[i] if other is None else other
    return found
