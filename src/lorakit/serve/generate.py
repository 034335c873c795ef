"""Text from an opened model: streamed, greedy by default."""

from collections.abc import Iterator, Sequence
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from lorakit.core.errors import BadParameter
from lorakit.data.chat import Chats, Message, Tools
from lorakit.serve.open import Opened


def stream(opened: Opened, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
    """Pieces of the continuation of `prompt`, as they are made."""
    ids = opened.tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
    yield from _stream(opened, ids, max_new_tokens, temperature, seed)


def stream_chat(
    opened: Opened,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the assistant's next turn, which may be a call of one of the `tools`. Raises BadParameter without a chat template."""
    if opened.tokenizer.chat_template is None:
        raise BadParameter("this model's tokenizer has no chat template; use generate, or train with --chat-template")
    ids = torch.tensor([Chats(opened.tokenizer).prompt(messages, tools)])
    yield from _stream(opened, ids, max_new_tokens, temperature, seed)


def complete(opened: Opened, prompt: str, **options: Any) -> str:
    """The whole continuation."""
    return "".join(stream(opened, prompt, **options))


def _stream(opened: Opened, ids: torch.Tensor, max_new_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    model: Any = opened.model
    if not model.can_generate():
        raise BadParameter(f"{type(model).__name__} is a classifier and generates no text; use eval")
    if not ids.numel():  # an empty prompt starts where a text starts
        start = opened.tokenizer.bos_token_id if opened.tokenizer.bos_token_id is not None else opened.tokenizer.eos_token_id
        ids = torch.tensor([[start]])
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit:  # keep the end of a prompt that would not fit, and leave room for the answer
        ids = ids[:, -max(1, limit - max_new_tokens) :]
    streamer = TextIteratorStreamer(opened.tokenizer, skip_prompt=not model.config.is_encoder_decoder, skip_special_tokens=True)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": opened.tokenizer.pad_token_id, "max_new_tokens": max_new_tokens}
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(seed)
            model.generate(ids.to(model.device), streamer=streamer, **options)
        except BaseException as error:  # raised again in the caller's thread
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
