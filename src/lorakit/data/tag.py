"""Tag rows {tokens, tags} -> encoded samples: the tag of a word is the label of its first sub-token, and the others are IGNORED.

Every word is tokenized by itself, with the blank before it that running text has, so what belongs to which word is known for any tokenizer.
A word that the tokenizer drops (a lone control character) has no label. Longer rows lose their last words.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError, did_you_mean
from lorakit.data.account import Counts, account_of
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.row import Row, kind_of, shape_of
from lorakit.data.samples import Samples
from lorakit.data.tokenize import Label, Tokenized, place_of, tokens_of


def tokenize_tags(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], names: Sequence[Label], *, max_length: int
) -> Tokenized[Encoded]:
    """Samples of tag rows, labels aligned with their tokens; a tag's number is its place in `names` .

    DataError for a tag that is not among them, or if no row keeps a labeled token.
    """
    if not len(rows):
        raise DataError("there are no rows to tokenize")
    if (shape := shape_of(rows[0])) != "tag":
        raise DataError(f"these rows are {shape} data; token classification needs {{tokens, tags}} rows")
    words = Words(tokenizer)
    if (room := max_length - len(words.before) - len(words.after)) < 1:
        raise DataError(f"max_length is {max_length}, and the tokenizer's own tokens take all of it; raise it")
    number = {name: i for i, name in enumerate(names)}
    samples, truncated, cut = list[Encoded](), 0, 0
    for i, row in enumerate(rows):
        pieces = words.pieces(row["tokens"])
        ids = [token for piece in pieces for token in piece]
        if (unknown := next((tag for tag in row["tags"] if tag not in number), None)) is not None:
            hint = did_you_mean(str(unknown), map(str, number))
            raise DataError(f"{place_of(rows, i)}: the tag {unknown!r} is not among the known ones. {hint}".rstrip())
        labels = [label for piece, tag in zip(pieces, row["tags"], strict=True) for label in _labels(piece, number[tag])]
        sample = Encoded(
            [*words.before, *ids[:room], *words.after],
            [*[IGNORED] * len(words.before), *labels[:room], *[IGNORED] * len(words.after)],
            kind_of(row),
        )
        if sample.trained:
            samples.append(sample)
            truncated += len(ids) > room
            cut += max(0, len(ids) - room)
    if not samples:
        raise DataError(f"none of the {len(rows)} rows has a labeled token within max_length={max_length}")
    trained, dropped = sum(sample.trained for sample in samples), len(rows) - len(samples)
    counts = Counts(rows=len(rows), truncated=truncated, cut=cut, trained=trained, dropped=dropped)
    counts += tokens_of(tokenizer, Samples.of(samples, "token"))
    return Tokenized(samples, len(rows), truncated=truncated, dropped=dropped, account=account_of(tokenizer, counts, "tag", max_length))


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
