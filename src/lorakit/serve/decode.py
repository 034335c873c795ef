"""Text from a causal model, token by token, where something happens between the tokens that `model.generate` has no place for.

A `Next` takes the ids that are new (the prompt, then each token as it was chosen) and returns log probabilities of the one that follows, or
logits: only their softmax counts. It keeps its own cache.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import BadParameter

Next = Callable[[Tensor], Tensor]
"""ids [1, t] -> [v]."""


def next_token(model: nn.Module) -> Next:
    """The model with a cache of its own: its logits at the last position."""
    net: Any = model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(net).forward).parameters else {}
    cache: Any = None

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        nonlocal cache
        out = net(input_ids=ids.to(net.device), past_key_values=cache, use_cache=True, **last)
        cache = out.past_key_values
        return out.logits[0, -1]  # type: ignore[no-any-return]

    return step


def decode(
    step: Next, ids: Tensor, *, stop: Collection[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """The tokens that follow `ids` [1, t], until one of `stop`, which is not among them. Temperature 0 is greedy."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        token = _chosen(step(ids).float().cpu(), temperature, rng)
        if token in stop:
            return
        yield token
        ids = torch.tensor([[token]])


def _chosen(logits: Tensor, temperature: float, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng))


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Text as soon as it is certain: a character of several tokens waits for its last one."""
    seen, said = list[int](), 0
    for token in tokens:
        seen.append(token)
        text = _text(tokenizer, seen)
        if not text.endswith("�"):
            yield text[said:]
            said = len(text)
    if rest := _text(tokenizer, seen)[said:]:
        yield rest


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompt_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, *, room: int) -> Tensor:
    """The prompt's ids [1, t], without its beginning where `room` tokens more would not fit. Raises BadParameter for a model that does not
    continue texts."""
    net: Any = model
    if not net.can_generate() or net.config.is_encoder_decoder:
        raise BadParameter(f"{type(model).__name__} is no causal language model, so there is no text that it continues; use scores instead")
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
    if not ids.numel():  # an empty prompt starts where a text starts
        ids = torch.tensor([[tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]])
    limit = getattr(net.config, "max_position_embeddings", None)
    return ids[:, -max(1, limit - room) :] if limit else ids


def stops(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: the model's and the tokenizer's."""
    net: Any = model
    own = net.generation_config.eos_token_id
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return frozenset(int(i) for i in found if i is not None)
