"""A conversation as one training sample, with the loss on what the assistant said.

The conversation is rendered by the tokenizer's chat template and tokenized once, as in use. Which characters are the assistant's:
    marked    a template with {% generation %} says so itself
    prefix    else, for each assistant turn, what `messages[:i+1]` renders beyond `messages[:i]` with the generation prompt;
              line breaks that the template puts behind the end-of-turn token are not the model's to write, and are left out
A token is trained on if it holds one of those characters. The end of the turn belongs to them, so the model learns to stop.
A message's own "train": true or false comes before all that: any message can be learned, or left out.

Tools that a conversation may use are given to the template, which writes them and the calls of them as the model knows them. Where it does
not, the list is left out, and calls are written into the content as JSON, an object a line: nothing that was said is lost.
"""

import json
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
Tools = list[dict[str, Any]]
Span = tuple[int, int]  # characters [start, end) of the rendered text
Trained = Iterator[tuple[list[int], NDArray[np.bool_]]]  # each text's tokens, and which are learned

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    train_on: TrainOn = "assistant",
    chat_template: str | None = None,
    tools: Tools | None = None,
) -> Encoded:
    """The conversation's tokens; labels on the assistant's turns, on the last of them, or on everything.

    Args:
        messages: [{"role", "content"}, ..] as the template expects them; "train" in one of them says whether it is learned.
        tools: what the assistant may call, as OpenAI describes functions: [{"type": "function", "function": {"name", ..}}, ..].
        train_on: "assistant", "last" for the last assistant turn alone, or "all" for every token.
        chat_template: a Jinja template to use in place of the tokenizer's own.

    DataError if there is no template, no assistant turn, or a template without {% generation %} whose rendering of a turn
    changes with what follows (some drop earlier reasoning), so that no prefix can be told apart.
    """
    return Chats(tokenizer, train_on, chat_template).encode([messages], [tools])[0]


class Chats:
    """Conversations to samples: a tokenizer, its template, and what is learned. Raises DataError as `encode_chat` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "assistant", chat_template: str | None = None) -> None:
        if train_on not in ("assistant", "all", "last"):
            raise DataError(f"train_on is {train_on!r}; choose 'assistant', 'last' or 'all'")
        self.tokenizer, self.train_on = tokenizer, train_on
        self.given = chat_template
        self.template = _Template(tokenizer, _template(tokenizer, chat_template))

    def encode(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools | None] | None = None) -> list[Encoded]:
        """`encode_chat` of each; their texts are tokenized in one call."""
        marked = [self.marked(*one) for one in zip(conversations, tools or [None] * len(conversations), strict=True)]
        return _labeled(self.tokenizer, [text for text, _ in marked], [spans for _, spans in marked])

    def blind(self, messages: Sequence[Message], tools: Tools | None = None) -> bool:
        """Whether the template does not show the tools, or calls of them."""
        template = self._template_for(tools)
        return bool(tools and not template.shows_tools) or (not template.shows_calls and any(m.get("tool_calls") for m in messages))

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """The conversation's tokens up to the point where the assistant speaks."""
        template, plain, shown = self._shown(messages, tools)
        return token_ids(self.tokenizer, [template.render(plain, shown, prompt=True)], special=False)[0]

    def _shown(self, messages: Sequence[Message], tools: Tools | None) -> tuple["_Template", list[Message], Tools | None]:
        """The template, and what it is given."""
        template = self._template_for(tools)
        plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        plain = plain if template.shows_calls else [_spelled(message) for message in plain]
        return template, plain, tools if tools and template.shows_tools else None

    @cached_property
    def _using_tools(self) -> "_Template":
        text = _template(self.tokenizer, self.given, tools=True)
        return self.template if text == self.template.text else _Template(self.tokenizer, text)

    def _template_for(self, tools: Tools | None) -> "_Template":
        return self._using_tools if tools else self.template

    def marked(self, messages: Sequence[Message], tools: Tools | None = None) -> tuple[str, list[Span] | None]:
        """The conversation as text, and what of it is learned; None for every token."""
        template, plain, tools = self._shown(messages, tools)
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = {i for i, message in enumerate(messages) if message.get("train", self._learned(i, assistants))}
        if self.train_on != "all" and not assistants and not any("train" in message for message in messages):
            raise DataError("the conversation has no assistant message to learn from; add one, or pass train_on='all'")
        if self.train_on == "all" and len(learned) == len(messages):
            return template.render(plain, tools), None
        if self.train_on == "all":  # what the template writes between the turns is learned, too
            text, spans = template.prefix_spans(plain, tools, sorted(set(range(len(messages))) - learned))
            return text, _between(spans, len(text))
        if learned <= set(assistants) and (spans_of := template.marked_spans(plain, tools, len(assistants))) is not None:
            text, spans = spans_of
            if learned == set(assistants):
                return text, spans
            if len(spans) == len(assistants):
                return text, [span for i, span in zip(assistants, spans, strict=True) if i in learned]
        return template.prefix_spans(plain, tools, sorted(learned))

    def _learned(self, i: int, assistants: list[int]) -> bool:
        return self.train_on == "all" or i in (assistants[-1:] if self.train_on == "last" else assistants)


def _spelled(message: Message) -> Message:
    """The message with its calls in its content."""
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message["tool_calls"]]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([*([message["content"]] if message["content"] else []), *calls])}


def _between(spans: list[Span], end: int) -> list[Span]:
    cuts = [0, *(at for span in spans for at in span), end]
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def _template(tokenizer: PreTrainedTokenizerBase, given: str | None, *, tools: bool = False) -> str:
    try:
        return tokenizer.get_chat_template(given, tools=[{}] if tools else None)  # some have one of their own for tools
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
    def shows_tools(self) -> bool:
        """Whether it writes the tools that may be called."""
        return "tools" in self.text

    @cached_property
    def shows_calls(self) -> bool:
        """Whether it writes calls of them."""
        return "tool_calls" in self.text

    @cached_property
    def names(self) -> dict[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    @cached_property
    def special(self) -> tuple[str, ...]:
        return tuple({token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special})

    def render(self, messages: Sequence[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        return self._rendered(messages, tools, marked=False, prompt=prompt)[0]

    def _rendered(self, messages: Sequence[Message], tools: Tools | None, *, marked: bool, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the spans of its {% generation %} blocks if `marked`."""
        render: Any = render_jinja_template  # its annotation says str; it returns (texts, spans)
        try:
            texts, spans = render(
                conversations=[list(messages)], tools=tools, chat_template=self.text, return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt, **self.names,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"the chat template refuses a conversation with the roles {roles or '(none)'}: {error}") from None
        return texts[0], [(start, end) for start, end in spans[0]] if marked else []

    def marked_spans(self, messages: Sequence[Message], tools: Tools | None, turns: int) -> tuple[str, list[Span]] | None:
        """What the template itself marks; None where it has no way to. DataError where it could and marks nothing."""
        if not self.marks or not turns:
            return None
        text, spans = self._rendered(messages, tools, marked=True)
        if not any(end > start for start, end in spans):
            raise DataError("the chat template's {% generation %} block marks nothing in this conversation; pass another chat_template")
        return text, [(start, self._past_eos(text, end)) for start, end in spans]

    def _past_eos(self, text: str, end: int) -> int:
        """Some templates close the block before the EOS that ends the turn; the model must learn that EOS."""
        eos = self.names.get("eos_token")
        return end + len(eos) if eos and not text.endswith(eos, 0, end) and text.startswith(eos, end) else end

    def prefix_spans(self, messages: Sequence[Message], tools: Tools | None, wanted: Sequence[int]) -> tuple[str, list[Span]]:
        """The wanted messages' own text, ascending: an assistant's begins behind the generation prompt, another's with its header."""
        text = self.render(messages, tools)
        spans = []
        for i in wanted:
            prompt = messages[i]["role"] == "assistant"
            before = self.render(messages[:i], tools, prompt=prompt) if i or prompt else ""
            through = self.render(messages[: i + 1], tools) if i + 1 < len(messages) else text
            if not (through.startswith(before) and text.startswith(through)):
                raise DataError(_rewrites(i, before, through, text))
            said = self._turn(through[len(before) :])
            if not said and (messages[i]["content"] or messages[i].get("tool_calls")):
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
