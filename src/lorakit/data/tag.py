"""Tag rows {tokens, tags} -> encoded samples: the tag of a word is the label of its first sub-token, and the others are IGNORED.

Every word is tokenized by itself, with the blank before it that running text has, so what belongs to which word is known for any tokenizer.
A word that the tokenizer drops (a lone control character) has no label. Longer rows lose their last words.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError
from lorakit.data.account import Counts
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.row import Row, kind_of
from lorakit.data.samples import Samples
from lorakit.data.tokenized import How, Label, Rules, Tokenized, Tokenizing, number_of, shape_among, tokenized


def tokenize_tags(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    names: Sequence[Label],
    *,
    max_length: int,
    skip_bad: bool = False,
    how: How | None = None,
) -> Tokenized[Encoded]:
    """Samples of tag rows, labels aligned with their tokens; a tag's number is its place in `names` .

    DataError for a tag that is not among them, or if no row keeps a labeled token.
    """
    shape_among(rows, ["tag"], "token classification needs {tokens, tags} rows")
    return tokenized(_Tags(tokenizer, Rules("tag", max_length, classes=tuple(names), skip_bad=skip_bad)), rows, how)


class _Tags(Tokenizing):
    needs = "a labeled token"

    def check(self) -> None:
        """DataError where nothing but the tokenizer's own tokens would fit."""
        super().check()
        if self._room < 1:
            raise DataError(f"max_length is {self.rules.max_length}, and the tokenizer's own tokens take all of it; raise it")

    @cached_property
    def _words(self) -> "Words":
        return Words(self.tokenizer)

    @cached_property
    def _number(self) -> dict[Label, int]:
        return {name: i for i, name in enumerate(self.rules.classes)}

    @property
    def _room(self) -> int:
        return self.rules.max_length - len(self._words.before) - len(self._words.after)

    def some(self, rows: Sequence[Row]) -> tuple[list[Encoded], Counts]:
        """Rows without their last words, where they are too long."""
        made, beyond = list[Encoded](), list[int]()
        for row in rows:
            sample, more = self._sample(row)
            if sample.trained:
                made.append(sample)
                beyond.append(more)
        truncated, dropped = sum(map(bool, beyond)), len(rows) - len(made)
        return made, Counts(rows=len(rows), truncated=truncated, cut=sum(beyond), dropped=dropped)

    def tokens(self, samples: Samples[Any], made: list[Any]) -> Counts:
        """Every label is read where it stands."""
        return replace(super().tokens(samples, made), trained=int((samples.labels != IGNORED).sum()))

    def _sample(self, row: Row) -> tuple[Encoded, int]:
        """The sample, and how many tokens are cut from it."""
        words, room = self._words, self._room
        pieces = words.pieces(row["tokens"])
        numbers = [number_of(tag, self._number, "tag") for tag in row["tags"]]
        ids = [token for piece in pieces for token in piece]
        labels = [label for piece, number in zip(pieces, numbers, strict=True) for label in _labels(piece, number)]
        whole = [*words.before, *ids[:room], *words.after]
        learned = [*[IGNORED] * len(words.before), *labels[:room], *[IGNORED] * len(words.after)]
        return Encoded(whole, learned, kind_of(row)), max(0, len(ids) - room)


def encode_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
    """The tokens of a row of words, and where each word begins among them; None for a word that the tokenizer drops."""
    known = Words(tokenizer)
    ids, firsts = list(known.before), list[int | None]()
    for piece in known.pieces(words):
        firsts.append(len(ids) if piece else None)
        ids += piece
    return [*ids, *known.after], firsts


class Words:
    """A tokenizer, one word at a time; `before` and `after` are the tokens that it puts around a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        a, spaced, b, text = self._ids(["a", " b", "b", "a b"])
        self.blank = "" if a + b == text else " " if a + spaced == text else ""
        whole = list(tokenizer("a", verbose=False)["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(a)] == a), 0)
        self.before, self.after = whole[:at], whole[at + len(a) :]

    def pieces(self, words: Sequence[str]) -> list[list[int]]:
        """Each word's tokens."""
        texts = [word if i == 0 else self.blank + word for i, word in enumerate(words)]
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known |= zip(new, self._ids(new), strict=True) if new else {}
        return [self.known[text] for text in texts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _labels(piece: list[int], number: int) -> list[int]:
    return [number, *[IGNORED] * (len(piece) - 1)] if piece else []
