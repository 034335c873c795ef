"""A conversation as one training sample, with the loss on what the assistant said.

The conversation is rendered by the tokenizer's chat template and tokenized once, as in use. Which characters are the assistant's:
    marked    a template with {% generation %} says so itself
    prefix    else, for each assistant turn, what `messages[:i+1]` renders beyond `messages[:i]` with the generation prompt;
              line breaks that the template puts behind the end-of-turn token are not the model's to write, and are left out
A token is trained on if it holds one of those characters. The end of the turn belongs to them, so the model learns to stop.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lorakit.core.errors import DataError
from lorakit.data.encoded import IGNORED, Encoded

TrainOn = Literal["assistant", "all"]
Message = dict[str, Any]
Span = tuple[int, int]  # characters [start, end) of the rendered text

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    train_on: TrainOn = "assistant",
    chat_template: str | None = None,
) -> Encoded:
    """The conversation's tokens; labels on the assistant's turns, or on everything.

    Args:
        messages: [{"role", "content"}, ..] as the template expects them.
        train_on: "assistant", or "all" for every token.
        chat_template: a Jinja template to use in place of the tokenizer's own.

    DataError if there is no template, no assistant turn, or a template without {% generation %} whose rendering of a turn
    changes with what follows (some drop earlier reasoning), so that no prefix can be told apart.
    """
    template = _template(tokenizer, chat_template)
    if train_on == "all":
        ids = _tokenize(tokenizer, _render(tokenizer, template, messages))["input_ids"]
        return Encoded(list(ids), list(ids))
    if train_on != "assistant":
        raise DataError(f"train_on is {train_on!r}; choose 'assistant' or 'all'")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("the conversation has no assistant message to learn from; add one, or pass train_on='all'")
    spans = _marked_spans if _GENERATION.search(template) else _prefix_spans
    return _labeled(tokenizer, *spans(tokenizer, template, messages))


def _template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    try:
        return tokenizer.get_chat_template(given)
    except ValueError:
        named = sorted(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else []
        options = f"the name of one of its templates ({', '.join(named)})" if named else "a Jinja template"
        raise DataError(
            f"the tokenizer has no default chat template; pass chat_template={options}, or use text or prompt/completion rows"
        ) from None


def _render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, prompt: bool = False) -> str:
    return _rendered(tokenizer, template, messages, marked=False, prompt=prompt)[0]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, marked: bool, prompt: bool = False
) -> tuple[str, list[Span]]:
    """The text, and the spans of its {% generation %} blocks if `marked`."""
    render: Any = render_jinja_template  # its annotation says str; it returns (texts, spans)
    try:
        texts, spans = render(
            conversations=[list(messages)], chat_template=template, return_assistant_tokens_mask=marked, add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(f"the chat template refuses a conversation with the roles {roles or '(none)'}: {error}") from None
    return texts[0], [(start, end) for start, end in spans[0]] if marked else []


def _marked_spans(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    text, spans = _rendered(tokenizer, template, messages, marked=True)
    if not any(end > start for start, end in spans):
        raise DataError("the chat template's {% generation %} block marks nothing in this conversation; pass another chat_template")
    return text, [(start, _past_eos(tokenizer, text, end)) for start, end in spans]


def _past_eos(tokenizer: PreTrainedTokenizerBase, text: str, end: int) -> int:
    """Some templates close the block before the EOS that ends the turn; the model must learn that EOS."""
    eos = tokenizer.eos_token
    return end + len(eos) if eos and not text.endswith(eos, 0, end) and text.startswith(eos, end) else end


def _prefix_spans(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    text = _render(tokenizer, template, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, template, messages[:i], prompt=True)
            through = _render(tokenizer, template, messages[: i + 1])
            if not (through.startswith(before) and text.startswith(through)):
                raise DataError(_rewrites(i, before, through, text))
            spans.append((len(before), len(before) + len(_turn(tokenizer, through[len(before) :]))))
    return text, spans


def _turn(tokenizer: PreTrainedTokenizerBase, said: str) -> str:
    """What the model itself writes of a turn: without the blank that the template adds behind a closing special token."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return said.rstrip() if said.rstrip().endswith(tuple(special)) else said


def _rewrites(i: int, before: str, through: str, text: str) -> str:
    whole, part = (through, before) if not through.startswith(before) else (text, through)
    at = next((k for k, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
    return (
        f"the template does not continue what it rendered up to message {i + 1}: {part[at : at + 30]!r} becomes {whole[at : at + 30]!r}, "
        "so the assistant's tokens cannot be told apart; pass a chat_template with {% generation %} blocks, or train_on='all', or end each "
        "conversation at its first assistant turn"
    )


# -- from characters to tokens ------------------------------------------------------------------------------------------------


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _labeled(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span]) -> Encoded:
    by = _trained_by_offsets if tokenizer.is_fast else _trained_by_prefix
    ids, trained = by(tokenizer, text, spans)
    return Encoded(ids, [i if t else IGNORED for i, t in zip(ids, trained, strict=True)])


def _trained_by_offsets(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
    encoding = _tokenize(tokenizer, text, return_offsets_mapping=True)
    trained, done = [], 0
    for start, end in encoding["offset_mapping"]:
        # Some tokenizers trim blanks from offsets; every character since the last token belongs to this one.
        first = min(start, done)
        trained.append(any(first < stop and end > begin for begin, stop in spans))
        done = max(done, end)
    return list(encoding["input_ids"]), trained


def _trained_by_prefix(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
    """For tokenizers without offsets: exact where a prefix's tokens are a prefix of the tokens, else refused."""
    ids = list(_tokenize(tokenizer, text)["input_ids"])
    trained = [False] * len(ids)
    for span in spans:
        first, last = (_prefix_length(tokenizer, text[:at], ids) for at in span)
        trained[first:last] = [True] * (last - first)
    return ids, trained


def _prefix_length(tokenizer: PreTrainedTokenizerBase, prefix: str, ids: list[int]) -> int:
    head = list(_tokenize(tokenizer, prefix)["input_ids"])
    if ids[: len(head)] != head:
        raise DataError(
            "the tokenizer joins the end of a turn with what follows and reports no offsets; load its fast version (use_fast=True)"
        )
    return len(head)
