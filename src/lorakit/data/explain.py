"""A sample as a user reads it: its tokens one by one, which of them are trained on, and what they say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.encoded import IGNORED, Encoded, Labeled
from lorakit.data.pack import Packed


@dataclass(frozen=True)
class Segment:
    """One token: its id, its text, whether the loss reads it, whether it is a special token, and the tag that is learned for it."""

    id: int
    text: str
    trained: bool
    special: bool
    tag: str = ""


@dataclass(frozen=True)
class View:
    """One sequence of a sample. `title` is empty where there is only one; `answer` is what is learned, as text."""

    title: str
    segments: tuple[Segment, ...]
    answer: str


def explained(
    tokenizer: PreTrainedTokenizerBase, item: Any, *, labels: Sequence[Any] = (), encoder_decoder: bool = False, tags: bool = False
) -> list[View]:
    """Every sequence of a sample, whatever its kind.

    Args:
        item: Encoded, Labeled, a packed window, or a dataclass of such (the answers of a preference).
        labels: names of classes or tags.
        encoder_decoder: an Encoded's labels are its target.
        tags: an Encoded's labels are the numbers of tags.
    """
    make = _Views(tokenizer, [str(label) for label in labels], encoder_decoder, tags)
    return list(make.of(item, ""))


@dataclass(frozen=True)
class _Views:
    tokenizer: PreTrainedTokenizerBase
    names: list[str]
    encoder_decoder: bool
    tags: bool

    def of(self, item: Any, title: str) -> Iterator[View]:
        if isinstance(item, Labeled):
            name = self.names[item.label] if item.label < len(self.names) else str(item.label)
            yield View(title, self._segments(item.input_ids, [False] * len(item.input_ids)), f"the class {name}")
        elif isinstance(item, Encoded) and self.encoder_decoder:
            yield View(f"{title} input".strip(), self._segments(item.input_ids, [False] * len(item.input_ids)), "")
            learned = [label != IGNORED for label in item.labels]
            ids = [label for label in item.labels if label != IGNORED]
            yield View(f"{title} target".strip(), self._segments(ids, [True] * sum(learned)), self._text(ids))
        elif isinstance(item, Encoded) and self.tags:
            trained = [label != IGNORED for label in item.labels]
            said = ["" if label == IGNORED else self.names[label] for label in item.labels]
            yield View(title, self._segments(item.input_ids, trained, said), f"{sum(trained)} tags")
        elif isinstance(item, Encoded | Packed):
            # labels are shifted: nothing stands before the first token that could predict it
            trained = [i > 0 and label != IGNORED for i, label in enumerate(item.labels)]
            answer = self._text([i for i, t in zip(item.input_ids, trained, strict=True) if t])
            yield View(title, self._segments(item.input_ids, trained), answer)
        elif is_dataclass(item):
            for field in fields(item):
                value = getattr(item, field.name)
                if isinstance(value, bool):
                    yield View(field.name, (), "yes" if value else "no")
                else:
                    yield from self.of(value, f"{title} {field.name}".strip())

    def _segments(self, ids: Sequence[int], trained: Sequence[bool], tags: Sequence[str] = ()) -> tuple[Segment, ...]:
        special = {*self.tokenizer.all_special_ids, *(i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special)}
        known = {i: self._token(i) for i in set(ids)}
        said = tags or [""] * len(ids)
        return tuple(Segment(i, known[i], t, i in special, tag) for i, t, tag in zip(ids, trained, said, strict=True))

    def _token(self, i: int) -> str:
        """The token's text; its own name where it is no text by itself, as a part of a character is not."""
        name = str(self.tokenizer.convert_ids_to_tokens(i))
        text = str(self.tokenizer.decode([i], clean_up_tokenization_spaces=False))
        if "�" in text or not text:
            return name
        return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
