"""Rows -> encoded samples of at most max_length tokens, with an account of everything that had to be cut.

text       longer texts become several samples; no token is lost; a text of one token predicts nothing and is dropped
chat,      longer ones lose their end; where no trained token would be left, the row is dropped
pair
classify   longer texts lose their end (see `tokenize_classes`)

Rows are taken a few at a time, in this process or in several, and always give the same bits. Many rows' samples lie on disk, and are
found again when the same rows meet the same tokenizer (`token_cache`); few stay in memory.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError, did_you_mean
from lorakit.data.account import Account, Counts, account_of
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
from lorakit.data.lazy import Chain, Chosen, Made
from lorakit.data.parallel import in_processes
from lorakit.data.progress import advancing
from lorakit.data.row import Row, Shape, data_hash, kind_of, shape_of
from lorakit.data.samples import Layout, Samples, gathered
from lorakit.data.token_cache import TokenCache

Sample = TypeVar("Sample")
Label = str | int

LARGE = 2000
"""Rows from which on samples are cached on disk; fewer are tokenized again, in less time than the cache would take (about a second)."""
BATCH = 256
"""Rows given to the tokenizer at once, and to a process: enough to hide the cost of a call, few enough to stay small."""
CHARACTERS = 1 << 21
"""Characters given to the tokenizer at once, but for a longer text: what bounds memory where rows are whole books."""
ROWS_A_WORKER = 50_000
"""Rows from which on another process is worth its start, which takes as long as tokenizing some thousand rows."""


@dataclass(frozen=True)
class Tokenized(Generic[Sample]):
    """Samples, and how many of the `rows` were chunked (texts), truncated, or dropped (nothing to learn within the limit)."""

    samples: Sequence[Sample]
    rows: int
    chunked: int = 0
    truncated: int = 0
    dropped: int = 0
    bad: int = 0
    account: Account | None = None
    """The same at length."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it was done."""

    def __str__(self) -> str:
        counts = {
            "cut into chunks": self.chunked,
            "truncated": self.truncated,
            "dropped, no trained token left": self.dropped,
            "left out as bad": self.bad,
        }
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
    skip_bad: bool = False,
    how: "How | None" = None,
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
    _check(rows, max_length)
    shape = shape_of(rows[0])
    if shape not in ("text", "chat", "pair") or (encoder_decoder and shape != "pair"):
        raise DataError(
            f"these rows are {shape} data; expected {'{prompt, completion} rows' if encoder_decoder else 'text, chat or pair rows'}"
        )
    rules = Rules(shape, max_length, train_on, chat_template, encoder_decoder, skip_bad=skip_bad)
    return _tokenized(Tokenizing(tokenizer, rules), rows, how or How())


def tokenize_classes(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    classes: Sequence[Label],
    *,
    max_length: int,
    skip_bad: bool = False,
    how: "How | None" = None,
) -> Tokenized[Labeled]:
    """Samples of {text, label} rows; a label's number is its place in `classes` (see `class_names`)."""
    _check(rows, max_length)
    if shape_of(rows[0]) != "classify":
        raise DataError(f"these rows are {shape_of(rows[0])} data; classification needs {{text, label}} rows")
    rules = Rules("classify", max_length, classes=tuple(classes), skip_bad=skip_bad)
    return _tokenized(Tokenizing(tokenizer, rules), rows, how or How())


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


def _check(rows: Sequence[Row], max_length: int) -> None:
    if not len(rows):
        raise DataError("there are no rows to tokenize")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; expected at least 2, as a lone token predicts nothing")


# ------------------------------------------------------------------------------------------------------------- a few rows at a time
@dataclass(frozen=True)
class Rules:
    """How rows of one shape become samples: with the tokenizer, all that decides their bits."""

    shape: Shape
    max_length: int
    train_on: TrainOn = "assistant"
    chat_template: str | None = None
    encoder_decoder: bool = False
    classes: tuple[Label, ...] = ()
    skip_bad: bool = False

    @property
    def layout(self) -> Layout:
        """How the samples' labels lie."""
        return "class" if self.shape == "classify" else "target" if self.encoder_decoder else "token"

    @property
    def first(self) -> int:
        """The first label that is predicted: 1 where labels are shifted, 0 for an encoder-decoder."""
        return 0 if self.encoder_decoder else 1


@dataclass(frozen=True)
class Tokenizing:
    """Rows -> samples and counts. It can be pickled, so that another process does the same."""

    tokenizer: PreTrainedTokenizerBase
    rules: Rules

    def check(self) -> None:
        """DataError for what no row can be tokenized without."""
        if self.rules.shape == "chat":
            _ = self._chats
        elif self.rules.shape != "classify":
            eos_id(self.tokenizer)

    def __call__(self, rows: Sequence[Row], where: Callable[[int], str]) -> tuple[Samples[Any], Counts]:
        """Samples of these rows; `where(i)` names the i-th in errors."""
        done: list[Any] = []
        counts, start = Counts(), 0
        for end in _ends(rows):
            samples, more = self._some(rows[start:end], lambda i, start=start: where(start + i))  # type: ignore[misc]
            done, counts, start = done + samples, counts + more, end
        samples_ = Samples.of(done, self.rules.layout)
        return samples_, counts + self._counts(samples_, done)

    def _some(self, rows: Sequence[Row], where: Callable[[int], str]) -> tuple[list[Any], Counts]:
        try:
            return self._all(rows)
        except DataError as error:
            if len(rows) == 1:
                said = f"{where(0)}: {error}"
                if not self.rules.skip_bad:
                    raise DataError(said) from None
                return [], Counts(rows=1, bad=1, named=(said,))
        done: list[Any] = []
        counts = Counts()
        for i, row in enumerate(rows):
            samples, more = self._some([row], lambda _, i=i: where(i))  # type: ignore[misc]
            done, counts = done + samples, counts + more
        return done, counts

    def _all(self, rows: Sequence[Row]) -> tuple[list[Any], Counts]:
        if self.rules.shape == "classify":
            return self._classes(rows)
        closing = Closing()
        whole = self._whole(rows, closing)
        whole = [one if (kind := kind_of(row)) is None else replace(one, kind=kind) for one, row in zip(whole, rows, strict=True)]
        samples, counts = (self._chunked if self.rules.shape == "text" else self._truncated)(whole)
        return samples, counts + self._of_rows(whole) + Counts(rows=len(rows), appended=closing.appended, spelled=closing.spelled)

    def _whole(self, rows: Sequence[Row], closing: Closing) -> list[Encoded]:
        tokenizer, rules = self.tokenizer, self.rules
        if rules.shape == "text":
            return encode_texts(tokenizer, [row["text"] for row in rows], closing=closing)
        if rules.shape == "chat":
            return self._chats.encode([row["messages"] for row in rows])
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
        kept = [one for one in whole if self._learns(one)]
        samples = [piece for one in kept for piece in chunks(one, self.rules.max_length)]
        longer = sum(len(one.input_ids) > self.rules.max_length for one in kept)
        return samples, Counts(chunked=longer, dropped=len(whole) - len(kept))

    def _truncated(self, whole: list[Encoded]) -> tuple[list[Encoded], Counts]:
        limit = self.rules.max_length
        samples, truncated, cut = [], 0, 0
        for one in whole:
            if not self._learns(one):
                continue
            if max(len(one.input_ids), len(one.labels)) > limit:
                truncated += 1
                cut += max(0, len(one.input_ids) - limit) + (max(0, len(one.labels) - limit) if self.rules.encoder_decoder else 0)
                one = replace(one, input_ids=one.input_ids[:limit], labels=one.labels[:limit])
            samples.append(one)
        return samples, Counts(truncated=truncated, cut=cut, dropped=len(whole) - len(samples))

    def _learns(self, sample: Encoded, limit: int | None = None) -> bool:
        return any(label != IGNORED for label in sample.labels[self.rules.first : limit or self.rules.max_length])

    def _classes(self, rows: Sequence[Row]) -> tuple[list[Labeled], Counts]:
        number = {label: i for i, label in enumerate(self.rules.classes)}
        limit, tokenizer = self.rules.max_length, self.tokenizer
        numbers = [_number(row["label"], number) for row in rows]
        whole = token_ids(tokenizer, [row["text"] for row in rows], special=True)
        long = [i for i, ids in enumerate(whole) if len(ids) > limit]
        if long:  # the tokenizer truncates by itself, since it keeps a closing [SEP]
            short = token_ids(tokenizer, [rows[i]["text"] for i in long], special=True, truncation=True, max_length=limit)
            cut = sum(len(whole[i]) for i in long) - sum(map(len, short))
            for i, ids in zip(long, short, strict=True):
                whole[i] = ids
        samples = [Labeled(ids, label, kind_of(row)) for ids, label, row in zip(whole, numbers, rows, strict=True)]
        return samples, Counts(rows=len(rows), truncated=len(long), cut=cut if long else 0) + self._begins(whole)

    def _of_rows(self, whole: list[Encoded]) -> Counts:
        """What is counted by row, before anything is cut."""
        first = self.rules.first
        untaught = sum(all(label == IGNORED for label in one.labels[first:]) for one in whole)
        closed = sum(not self._special.isdisjoint(one.labels[first:]) for one in whole) if self.rules.shape == "chat" else 0
        return Counts(untaught=untaught, closed=closed) + self._begins([one.input_ids for one in whole])

    def _begins(self, whole: Sequence[Sequence[int]]) -> Counts:
        bos = self.tokenizer.bos_token_id
        return Counts(bos=sum(list(ids[:1]) == [bos] for ids in whole), twice=sum(list(ids[:2]) == [bos, bos] for ids in whole))

    def _counts(self, samples: Samples[Any], made: list[Any]) -> Counts:
        """What is counted by sample and token."""
        if not made:
            return Counts()
        counts = tokens_of(self.tokenizer, samples)
        if samples.layout == "class":
            return counts
        target, learned = samples.layout == "target", samples.labels != IGNORED
        trained = int(learned.sum()) - (0 if target else int(learned[samples.offsets[:-1]].sum()))
        return replace(counts, trained=trained, n_bytes=trained_bytes(self.tokenizer, made, shifted=not target))


def tokens_of(tokenizer: PreTrainedTokenizerBase, samples: Samples[Any]) -> Counts:
    """How many samples and tokens there are (of an encoder-decoder the targets' too), those that are unknown, and the largest."""
    values = samples.labels if samples.layout == "target" else samples.ids[:0]
    largest = max(int(samples.ids.max(initial=-1)), int(values.max(initial=-1)), int(tokenizer.pad_token_id or 0))
    unk = tokenizer.unk_token_id
    told = None if unk in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) else unk
    unknown = 0 if told is None else int((samples.ids == told).sum() + (values == told).sum())
    return Counts(samples=len(samples), tokens=len(samples.ids) + len(values), unknown=unknown, largest=largest)


def _ends(rows: Sequence[Row]) -> Iterator[int]:
    """Where the rows are cut, so that no part is long in characters."""
    long = 0
    for i, row in enumerate(rows):
        size = sum(len(value) for value in row.values() if isinstance(value, str))
        size += sum(len(message["content"]) for message in row.get("messages", ()))
        if long and long + size > CHARACTERS:
            yield i
            long = 0
        long += size
    yield len(rows)


def _number(label: Label, number: dict[Label, int]) -> int:
    if label not in number:
        raise DataError(f"the label {label!r} is not among the classes. {did_you_mean(str(label), map(str, number))}".rstrip())
    return number[label]


# ------------------------------------------------------------------------------------------------------------------- all of the rows
@dataclass(frozen=True)
class How:
    """In what way rows are tokenized: nothing here changes a bit of the samples."""

    workers: int | None = None
    """Processes; None: by the number of rows and cores."""
    rows_hash: Callable[[], str] | None = None
    """Gives the `data_hash` of the rows, where it is known already."""
    quiet: bool = False
    """Show no progress."""
    name: str = "tokenizing"
    cache: TokenCache | None = field(default_factory=TokenCache.here)
    """Where many rows' samples lie; None: in memory."""

    def processes(self, n: int) -> int:
        """How many are used for so many rows."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or max(1, min(cores, n // ROWS_A_WORKER))


def _tokenized(tokenizing: Tokenizing, rows: Sequence[Row], how: How) -> Tokenized[Any]:
    tokenizing.check()
    rules = tokenizing.rules
    notes: tuple[str, ...] = ()
    if how.cache is not None and len(rows) >= LARGE and tokenizing.tokenizer.is_fast:
        rows_hash = data_hash(rows) if how.rows_hash is None else how.rows_hash()
        found = how.cache.entry(tokenizing.tokenizer, rules, rows_hash, lambda: _parts(tokenizing, rows, how))
        samples, counts, notes = found.samples, found.counts, found.notes
    else:
        samples, counts = gathered(_parts(tokenizing, rows, how), rules.layout)
    if not len(samples):
        raise DataError(
            f"none of the {len(rows)} rows has a trained token within max_length={rules.max_length}; raise it or shorten the prompts"
        )
    account = account_of(tokenizing.tokenizer, counts, rules.shape, rules.max_length, encoder_decoder=rules.encoder_decoder)
    return Tokenized(samples, counts.rows, counts.chunked, counts.truncated, counts.dropped, counts.bad, account, notes)


def _parts(tokenizing: Tokenizing, rows: Sequence[Row], how: How) -> Iterator[tuple[Samples[Any], Counts]]:
    """The samples of a few rows after the other, in order."""
    n = len(rows)
    spans = [range(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]
    carried = isinstance(rows, list)  # rows of a file are read where they are tokenized
    tasks = ((span, [rows[i] for i in span] if carried else None) for span in spans)
    work = _Work(tokenizing, None if carried else rows)
    with advancing(how.name, n, quiet=how.quiet or n < LARGE) as advance:
        count = how.processes(n)
        made = in_processes(work, tasks, count, required=how.workers is not None) if count > 1 else map(work, tasks)
        for span, part in zip(spans, made, strict=True):
            yield part
            advance(len(span))


@dataclass(frozen=True)
class _Work:
    tokenizing: Tokenizing
    rows: Sequence[Row] | None
    """Where a task brings none."""

    def __call__(self, task: tuple[range, Sequence[Row] | None]) -> tuple[Samples[Any], Counts]:
        span, brought = task
        rows = brought if self.rows is None else [self.rows[i] for i in span]
        return self.tokenizing(rows or [], lambda i: place_of(self.rows, span.start + i))


def place_of(rows: Sequence[Row] | None, i: int) -> str:
    """How errors call the i-th row: its file and line, where they are known."""
    if isinstance(rows, Chosen):
        return place_of(rows.rows, int(rows.places[i]))
    if isinstance(rows, Chain):
        k = bisect_right(rows.ends, i)
        return place_of(rows.parts[k], i - (rows.ends[k - 1] if k else 0))
    return str(rows.records.where(i)) if isinstance(rows, Made) else f"row {i + 1}"
