"""What tokenizing did with the rows: counts that add up over batches, the rules they stand for in a few lines, and what looks wrong."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

LISTED = 5
"""Rows left out that are named one by one."""
UNKNOWN = 0.01
"""A larger share of unknown tokens is worth a note."""


@dataclass(frozen=True)
class Counts:
    """How many rows, samples and tokens met which rule. `a + b` are those of both's rows."""

    rows: int = 0
    samples: int = 0
    chunked: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    """In the samples; of an encoder-decoder the targets' too."""
    trained: int = 0
    """Labels that the loss reads."""
    cut: int = 0
    """Tokens beyond the limit of rows that were truncated."""
    n_bytes: int = 0
    """UTF-8 bytes that the trained tokens stand for."""
    appended: int = 0
    """Rows that were given an EOS."""
    spelled: int = 0
    """Rows that ended in one by themselves."""
    closed: int = 0
    """Chats whose learned turns hold an EOS or another special token, so that the end of a turn is learned."""
    untaught: int = 0
    """Rows without any token to learn, however long the limit."""
    bos: int = 0
    """Rows that begin with BOS."""
    twice: int = 0
    """Rows that begin with it twice."""
    unknown: int = 0
    """Tokens that stand for what the tokenizer does not know."""
    largest: int = -1
    """The largest token id, of the padding too."""
    blind: int = 0
    """Chats whose tools, or calls of them, the template does not show."""
    bad: int = 0
    """Rows left out since they cannot be tokenized."""
    named: tuple[str, ...] = field(default=())
    """What the first of those were."""

    def __add__(self, other: "Counts") -> "Counts":
        sums: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Counts(**sums | {"largest": max(self.largest, other.largest), "named": sums["named"][:LISTED]})


@dataclass(frozen=True)
class Account:
    """The counts of one side of the data, and the words for them."""

    counts: Counts
    shape: str
    max_length: int
    eos: str
    bos: str
    pad: str
    unk: str
    encoder_decoder: bool = False
    windows: int = 0
    """How many they were packed into; 0: they are padded."""

    def lines(self) -> list[str]:
        """The rules and what they did, a line each."""
        return [f"{name:<12}{said}" for name, said in self._said()]

    def _said(self) -> Iterator[tuple[str, str]]:
        c = self.counts
        if self.shape == "classify":
            yield "tokens", f"{c.tokens:,} in {c.samples:,} texts; one class is learned of each"
        else:
            yield "tokens", f"{c.tokens:,} in {c.samples:,} samples; trained on {c.trained:,} ({_share(c.trained, c.tokens)})"
        if self.shape in ("text", "chat", "pair"):
            yield "EOS", self._eos()
        begins = f"{self.bos} begins {c.bos:,} of {c.rows:,} rows" if c.bos else "none is added" if self.bos else "the tokenizer has none"
        if self.shape in ("text", "chat", "pair", "classify"):
            yield "BOS", begins + (f", {c.twice:,} of them twice" if c.twice else "")
        if c.chunked:
            yield "chunks", f"{c.chunked:,} texts longer than max_length={self.max_length} became several samples; no token is lost"
        if self.shape != "text":
            lost = f"; {c.cut:,} tokens lost at their ends ({_share(c.cut, c.cut + c.tokens)})" if c.truncated else ""
            yield "truncation", f"{c.truncated:,} of {c.rows:,} rows longer than max_length={self.max_length}{lost}"
        if c.dropped:
            yield (
                "dropped",
                f"{c.dropped:,} rows without a trained token within the limit"
                + (f" ({c.untaught:,} had none at all)" if c.untaught else ""),
            )
        if c.bad:
            yield "left out", f"{c.bad:,} rows: " + "; ".join(c.named) + (" …" if c.bad > len(c.named) else "")
        if self.windows:
            full = _share(c.tokens, self.windows * self.max_length)
            yield "packing", f"{self.windows:,} windows of {self.max_length}, {full} full; no document sees another"
        shared = "; it is EOS as well, but padding is told apart by its place, so EOS is learned" if self.pad == self.eos else ""
        yield "padding", f"on the right, with {self.pad or 'token 0'}, never trained on{shared}"

    def _eos(self) -> str:
        c = self.counts
        if self.shape == "chat":
            return f"as the chat template closes turns: an end is learned in {c.closed:,} of {c.rows:,} chats"
        what = "targets" if self.encoder_decoder else "texts" if self.shape == "text" else "completions"
        there = f", {c.spelled:,} had it already" if c.spelled else ""
        lost = f", unless max_length cuts it off, as in {c.truncated:,}" if c.truncated and not self.encoder_decoder else ""
        return f"{self.eos} appended to {c.appended:,} of {c.rows:,} {what}{there}; it is trained on{lost}"

    def notes(self) -> list[str]:
        """What looks wrong, each with what to do."""
        return list(self._wrong())

    def _wrong(self) -> Iterator[str]:
        c = self.counts
        taught = c.rows - c.untaught - c.bad
        if self.shape == "chat" and c.closed < taught:
            yield (
                f"in {taught - c.closed:,} of {c.rows:,} chats no learned turn is closed by {self.eos or 'an EOS'} or another special "
                "token, so the model does not learn to stop there; choose a chat_template that closes the assistant's turns"
            )
        if c.untaught:
            yield f"{c.untaught:,} of {c.rows:,} rows have no token to learn; check the roles and 'train' of their messages, and train_on"
        if c.blind:
            yield (
                f"in {c.blind:,} of {c.rows:,} rows there are tools that the chat template does not show: the list of them is left out, "
                "and calls are JSON in the content; give the chat_template that the model learned to call tools with"
            )
        longer = c.truncated + c.dropped - c.untaught
        if 2 * longer > c.rows:
            yield f"{longer:,} of {c.rows:,} rows are longer than max_length={self.max_length}, and lose their ends; raise it"
        if c.unknown > UNKNOWN * c.tokens:
            yield f"{_share(c.unknown, c.tokens)} of the tokens are {self.unk}: this tokenizer does not know the data's characters or words"
        if c.twice:
            yield (
                f"{c.twice:,} of {c.rows:,} rows begin with {self.bos} twice: the text spells out the one that the tokenizer adds; "
                "remove it there"
            )


def account_of(
    tokenizer: PreTrainedTokenizerBase, counts: Counts, shape: str, max_length: int, *, encoder_decoder: bool = False
) -> Account:
    """The account of a side that this tokenizer made."""
    eos, bos, pad, unk = (str(getattr(tokenizer, f"{name}_token") or "") for name in ("eos", "bos", "pad", "unk"))
    return Account(counts, shape, max_length, eos, bos, pad, unk, encoder_decoder)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"
