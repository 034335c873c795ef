"""Rows -> samples, a few rows at a time, with an account of everything that had to be cut: what all shapes of rows share.

Rows are taken a few at a time, in this process or in several, and always give the same bits. Many rows' samples lie on disk, and are
found again when the same rows meet the same tokenizer (`token_cache`); few stay in memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError, did_you_mean
from lorakit.data.account import Account, Counts, account_of
from lorakit.data.chat import TrainOn
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.lazy import place_of
from lorakit.data.parallel import cores, in_processes
from lorakit.data.progress import advancing
from lorakit.data.row import Row, Shape, data_hash, leaving_out, shape_of
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
class Tokenizing(ABC):
    """Rows of one shape -> samples and counts. It can be pickled, so that another process does the same."""

    tokenizer: PreTrainedTokenizerBase
    rules: Rules
    needs = "a trained token"
    """What a row must have within the limit; else it is dropped."""

    def check(self) -> None:
        """DataError for what no row can be tokenized with or without."""
        if self.rules.max_length < 2:
            raise DataError(f"max_length is {self.rules.max_length}; expected at least 2, as a lone token predicts nothing")

    @abstractmethod
    def some(self, rows: Sequence[Row]) -> tuple[list[Any], Counts]:
        """The samples of a few rows, Encoded or Labeled, and what is counted by row. DataError if one of them cannot be used."""

    def tokens(self, samples: Samples[Any], made: list[Any]) -> Counts:
        """What is counted by sample and token; `made` are the same samples, at least one."""
        return replace(tokens_of(self.tokenizer, samples), trained=trained_of(samples))

    def learns(self, sample: Encoded) -> bool:
        """Whether a loss reads any of it within the limit."""
        return any(label != IGNORED for label in sample.labels[self.rules.first : self.rules.max_length])

    def beyond(self, sample: Encoded) -> int:
        """How many tokens are beyond the limit; of an encoder-decoder the target's too."""
        lengths = [len(sample.input_ids), *([len(sample.labels)] if self.rules.encoder_decoder else [])]
        return sum(max(0, n - self.rules.max_length) for n in lengths)

    def cut(self, sample: Encoded) -> Encoded:
        """Without them."""
        limit = self.rules.max_length
        return replace(sample, input_ids=sample.input_ids[:limit], labels=sample.labels[:limit]) if self.beyond(sample) else sample

    def __call__(self, rows: Sequence[Row], where: Callable[[int], str]) -> tuple[Samples[Any], Counts]:
        """Samples of these rows; `where(i)` names the i-th in errors."""
        done: list[Any] = []
        counts, start = Counts(), 0
        for end in _ends(rows):
            made, more = self._some(rows[start:end], lambda i, start=start: where(start + i))  # type: ignore[misc]
            done, counts, start = done + made, counts + more, end
        samples = Samples.of(done, self.rules.layout)
        return samples, counts + (self.tokens(samples, done) if done else Counts())

    def _some(self, rows: Sequence[Row], where: Callable[[int], str]) -> tuple[list[Any], Counts]:
        try:
            return self.some(rows)
        except DataError as error:
            if len(rows) == 1:
                said = f"{where(0)}: {error}"
                if not self.rules.skip_bad:
                    raise DataError(leaving_out(said)) from None
                return [], Counts(rows=1, bad=1, named=(said,))
        done: list[Any] = []
        counts = Counts()
        for i, row in enumerate(rows):
            samples, more = self._some([row], lambda _, i=i: where(i))  # type: ignore[misc]
            done, counts = done + samples, counts + more
        return done, counts


def tokens_of(tokenizer: PreTrainedTokenizerBase, samples: Samples[Any]) -> Counts:
    """How many samples and tokens there are (of an encoder-decoder the targets' too), those that are unknown, and the largest."""
    values = samples.labels if samples.layout == "target" else samples.ids[:0]
    largest = max(int(samples.ids.max(initial=-1)), int(values.max(initial=-1)), int(tokenizer.pad_token_id or 0))
    unk = tokenizer.unk_token_id
    told = None if unk in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) else unk
    unknown = 0 if told is None else int((samples.ids == told).sum() + (values == told).sum())
    return Counts(samples=len(samples), tokens=len(samples.ids) + len(values), unknown=unknown, largest=largest)


def trained_of(samples: Samples[Any]) -> int:
    """Labels that a loss reads: what a token predicts is the next one's, so the first of a sample is predicted by nothing; not so of an
    encoder-decoder's target. Classes: 0."""
    if samples.layout == "class":
        return 0
    learned = samples.labels != IGNORED
    return int(learned.sum()) - (0 if samples.layout == "target" else int(learned[samples.offsets[:-1]].sum()))


def number_of(label: Label, number: dict[Label, int], what: str) -> int:
    """The label's number. DataError naming the nearest where it has none; `what`: "label" or "tag"."""
    if label not in number:
        known = "classes" if what == "label" else "known ones"
        raise DataError(f"the {what} {label!r} is not among the {known}. {did_you_mean(str(label), map(str, number))}".rstrip())
    return number[label]


def shape_among(rows: Sequence[Row], shapes: Sequence[Shape], expected: str) -> Shape:
    """The rows' shape. DataError unless it is one of these, or if there are no rows."""
    if not len(rows):
        raise DataError("there are no rows to tokenize")
    if (shape := shape_of(rows[0])) not in shapes:
        raise DataError(f"these rows are {shape} data; {expected}")
    return shape


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
        return self.workers or max(1, min(cores(), n // ROWS_A_WORKER))


def tokenized(tokenizing: Tokenizing, rows: Sequence[Row], how: How | None = None) -> Tokenized[Any]:
    """All rows' samples in their order. DataError if no row leaves anything to learn."""
    how, rules = how or How(), tokenizing.rules
    tokenizing.check()
    notes: tuple[str, ...] = ()
    if how.cache is not None and len(rows) >= LARGE and tokenizing.tokenizer.is_fast:
        rows_hash = data_hash(rows) if how.rows_hash is None else how.rows_hash()
        found = how.cache.entry(tokenizing.tokenizer, rules, rows_hash, lambda: _parts(tokenizing, rows, how))
        samples, counts, notes = found.samples, found.counts, found.notes
    else:
        samples, counts = gathered(_parts(tokenizing, rows, how), rules.layout)
    if not len(samples):
        bad = f"; {counts.bad} cannot be used: {counts.named[0]}" if counts.bad else ""
        raise DataError(
            f"none of the {len(rows)} rows has {tokenizing.needs} within max_length={rules.max_length}; "
            f"raise it or shorten the prompts{bad}"
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


def _ends(rows: Sequence[Row]) -> Iterator[int]:
    """Where the rows are cut, so that no part is long in characters."""
    long = 0
    for i, row in enumerate(rows):
        size = _characters(row)
        if long and long + size > CHARACTERS:
            yield i
            long = 0
        long += size
    yield len(rows)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))
