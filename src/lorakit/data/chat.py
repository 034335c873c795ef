"""A conversation as one training sample, with the loss on what the assistant said.

The conversation is rendered by the tokenizer's chat template and tokenized once, as in use. Which characters are the assistant's:
    marked    a template with {% generation %} says so itself
    prefix    else, for each assistant turn, what `messages[:i+1]` renders beyond `messages[:i]` with the generation prompt;
              line breaks that the template puts behind the end-of-turn token are not the model's to write, and are left out
A token is trained on if it holds one of those characters. The end of the turn belongs to them, so the model learns to stop.
A message's own "train": true or false comes before all that: any message can be learned, or left out.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lorakit.core.errors import DataError
from lorakit.data.encoded import IGNORED, Encoded, token_ids, tokenize_all

TrainOn = Literal["assistant", "all", "last"]
Message = dict[str, Any]
Span = tuple[int, int]  # characters [start, end) of the rendered text
Trained = Iterator[tuple[list[int], NDArray[np.bool_]]]  # each text's tokens, and which are learned

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    train_on: TrainOn = "assistant",
    chat_template: str | None = None,
) -> Encoded:
    """The conversation's tokens; labels on the assistant's turns, on the last of them, or on everything.

    Args:
        messages: [{"role", "content"}, ..] as the template expects them; "train" in one of them says whether it is learned.
        train_on: "assistant", "last" for the last assistant turn alone, or "all" for every token.
        chat_template: a Jinja template to use in place of the tokenizer's own.

    DataError if there is no template, no assistant turn, or a template without {% generation %} whose rendering of a turn
    changes with what follows (some drop earlier reasoning), so that no prefix can be told apart.
    """
    return Chats(tokenizer, train_on, chat_template).encode([messages])[0]


class Chats:
    """Conversations to samples: a tokenizer, its template, and what is learned. Raises DataError as `encode_chat` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant", chat_template: str | None = None) -> None:
        if train_on not in ("assistant", "all", "last"):
            raise DataError(f"train_on is {train_on!r}; choose 'assistant', 'last' or 'all'")
        self.tokenizer, self.train_on = tokenizer, train_on
        self.template = _Template(tokenizer, _template(tokenizer, chat_template))

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """`encode_chat` of each; their texts are tokenized in one call."""
        marked = [self.marked(messages) for messages in conversations]
        return _labeled(self.tokenizer, [text for text, _ in marked], [spans for _, spans in marked])

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[Span] | None]:
        """The conversation as text, and what of it is learned; None for every token."""
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = {i for i, message in enumerate(messages) if message.get("train", self._learned(i, assistants))}
        if self.train_on != "all" and not assistants and not any("train" in message for message in messages):
            raise DataError("the conversation has no assistant message to learn from; add one, or pass train_on='all'")
        plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        if self.train_on == "all" and len(learned) == len(messages):
            return self.template.render(plain), None
        if self.train_on == "all":  # what the template writes between the turns is learned, too
            text, spans = self.template.prefix_spans(plain, sorted(set(range(len(messages))) - learned))
            return text, _between(spans, len(text))
        if learned <= set(assistants) and (spans_of := self.template.marked_spans(plain, len(assistants))) is not None:
            text, spans = spans_of
            if learned == set(assistants):
                return text, spans
            if len(spans) == len(assistants):
                return text, [span for i, span in zip(assistants, spans, strict=True) if i in learned]
        return self.template.prefix_spans(plain, sorted(learned))

    def _learned(self, i: int, assistants: list[int]) -> bool:
        return self.train_on == "all" or i in (assistants[-1:] if self.train_on == "last" else assistants)


def _between(spans: list[Span], end: int) -> list[Span]:
    cuts = [0, *(at for span in spans for at in span), end]
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def _template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    try:
        return tokenizer.get_chat_template(given)
    except ValueError:
        named = sorted(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else []
        options = f"the name of one of its templates ({', '.join(named)})" if named else "a Jinja template"
        raise DataError(
            f"the tokenizer has no default chat template; pass chat_template={options}, or use text or prompt/completion rows"
        ) from None


@dataclass(frozen=True)
class _Template:
    tokenizer: PreTrainedTokenizerBase
    text: str

    @cached_property
    def marks(self) -> bool:
        """Whether it says itself what the assistant wrote."""
        return _GENERATION.search(self.text) is not None

    @cached_property
    def names(self) -> dict[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def special(self) -> tuple[str, ...]:
        return tuple({token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special})

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        return self._rendered(messages, marked=False, prompt=prompt)[0]

    def _rendered(self, messages: Sequence[Message], *, marked: bool, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the spans of its {% generation %} blocks if `marked`."""
        render: Any = render_jinja_template  # its annotation says str; it returns (texts, spans)
        try:
            texts, spans = render(
                conversations=[list(messages)], chat_template=self.text, return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt, **self.names,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"the chat template refuses a conversation with the roles {roles or '(none)'}: {error}") from None
        return texts[0], [(start, end) for start, end in spans[0]] if marked else []

    def marked_spans(self, messages: Sequence[Message], turns: int) -> tuple[str, list[Span]] | None:
        """What the template itself marks; None where it has no way to. DataError where it could and marks nothing."""
        if not self.marks or not turns:
            return None
        text, spans = self._rendered(messages, marked=True)
        if not any(end > start for start, end in spans):
            raise DataError("the chat template's {% generation %} block marks nothing in this conversation; pass another chat_template")
        return text, [(start, self._past_eos(text, end)) for start, end in spans]

    def _past_eos(self, text: str, end: int) -> int:
        """Some templates close the block before the EOS that ends the turn; the model must learn that EOS."""
        eos = self.names.get("eos_token")
        return end + len(eos) if eos and not text.endswith(eos, 0, end) and text.startswith(eos, end) else end

    def prefix_spans(self, messages: Sequence[Message], wanted: Sequence[int]) -> tuple[str, list[Span]]:
        """The wanted messages' own text, ascending: an assistant's begins behind the generation prompt, another's with its header."""
        text = self.render(messages)
        spans = []
        for i in wanted:
            prompt = messages[i]["role"] == "assistant"
            before = self.render(messages[:i], prompt=prompt) if i or prompt else ""
            through = self.render(messages[: i + 1]) if i + 1 < len(messages) else text
            if not (through.startswith(before) and text.startswith(through)):
                raise DataError(_rewrites(i, before, through, text))
            said = self._turn(through[len(before) :])
            if not said and messages[i]["content"]:
                raise DataError(f"the chat template leaves out message {i + 1}, which is to be learned; pass another chat_template")
            spans.append((len(before), len(before) + len(said)))
        return text, spans

    def _turn(self, said: str) -> str:
        """What the model itself writes of a turn: without the blank that the template adds behind a closing special token."""
        bare = said.rstrip()
        return bare if bare.endswith(self.special) else said


def _rewrites(i: int, before: str, through: str, text: str) -> str:
    whole, part = (through, before) if not through.startswith(before) else (text, through)
    at = next((k for k, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
    return (
        f"the template does not continue what it rendered up to message {i + 1}: {part[at : at + 30]!r} becomes {whole[at : at + 30]!r}, "
        "so the turn's tokens cannot be told apart; pass a chat_template with {% generation %} blocks, or train_on='all', or end each "
        "conversation at its first assistant turn"
    )


# -- from characters to tokens ------------------------------------------------------------------------------------------------


def _labeled(tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[list[Span] | None]) -> list[Encoded]:
    by = _trained_by_offsets if tokenizer.is_fast else _trained_by_prefix
    return [Encoded(ids, np.where(trained, ids, IGNORED).tolist()) for ids, trained in by(tokenizer, texts, spans)]


def _trained_by_offsets(tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[list[Span] | None]) -> Trained:
    encoding = tokenize_all(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
    for ids, offsets, own in zip(encoding["input_ids"], encoding["offset_mapping"], spans, strict=True):
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        # Some tokenizers trim blanks from offsets; every character since the last token belongs to this one.
        done = np.maximum.accumulate(np.concatenate([[0], places[:, 1]]))[:-1]
        first, end = np.minimum(places[:, 0], done), places[:, 1]
        trained = np.full(len(ids), own is None)
        for begin, stop in own or ():
            trained |= (first < stop) & (end > begin)
        yield list(ids), trained


def _trained_by_prefix(tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[list[Span] | None]) -> Trained:
    """For tokenizers without offsets: exact where a prefix's tokens are a prefix of the tokens, else refused."""
    for text, own in zip(texts, spans, strict=True):
        ids = token_ids(tokenizer, [text], special=False)[0]
        trained = np.full(len(ids), own is None)
        for span in own or ():
            first, last = (_prefix_length(tokenizer, text[:at], ids) for at in span)
            trained[first:last] = True
        yield ids, trained


def _prefix_length(tokenizer: PreTrainedTokenizerBase, prefix: str, ids: list[int]) -> int:
    head = token_ids(tokenizer, [prefix], special=False)[0]
    if ids[: len(head)] != head:
        raise DataError(
            "the tokenizer joins the end of a turn with what follows and reports no offsets; load its fast version (use_fast=True)"
        )
    return len(head)
