"""Trained input embeddings in front of every sequence (prompt tuning; prefix tuning, embedding form).

    h₀ = [P; E(x)]        P [n, d]; the tokens' positions start at n; what leaves the model's body at the first n places is cut off

So logits, labels and pooling are aligned with the tokens as they were, and the head is never computed at the prompt. An encoder-decoder
has the prompt in front of its encoder's input only, and its decoder attends to what becomes of it. In decoding the prompt is in the cache
from the first step on. Windows of several documents are refused: one prompt would serve the first document only.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.context import Cell
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.shared import Patch
from lorakit.core.site import MIXTURES, Kind, Site

Start = Literal["words", "normal"]
Kwargs = dict[str, Any]


class Prompt(Patch):
    """P [n, d]."""

    trains = frozenset({"P"})

    def __init__(self, model: nn.Module, n: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model_of, self.handles = (model,), list[Any]()  # in a tuple: not a child
        self.P = nn.Parameter(torch.zeros(n, embeddings_of(model).embedding_dim, dtype=dtype, device=device))
        self.entered, self.encodes = False, bool(getattr(model.config, "is_encoder_decoder", False))

    def install(self) -> None:
        model: Any = self.model_of[0]
        body = model.get_encoder() if self.encodes else model.base_model
        if any(isinstance(getattr(hook, "__self__", None), Prompt) for hook in body._forward_pre_hooks.values()):
            raise Incompatible("two trained prompts cannot stand in front of one input: switch to one of them")
        if self.encodes:
            self.handles.append(model.register_forward_pre_hook(self._widen, with_kwargs=True))
            self.handles.append(body.register_forward_pre_hook(self._enter, with_kwargs=True))
            return
        self.handles.append(body.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.handles.append(body.register_forward_hook(self._leave))
        if (pooler := getattr(body, "pooler", None)) is not None:
            self.handles.append(pooler.register_forward_pre_hook(self._pool))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _enter(self, body: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], Kwargs]:
        """The body's arguments with the prompt in front, unless the cache holds it already."""
        kwargs, n = _named(body, args, kwargs), len(self.P)
        cache, mask, positions = (kwargs.get(k) for k in ("past_key_values", "attention_mask", "position_ids"))
        refuse(cache, mask, positions)
        past = 0 if cache is None else cache.get_seq_length()
        self.entered = past == 0
        embeds = kwargs.get("inputs_embeds")
        length = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
        if mask is not None:
            covered = mask.shape[1] == past + n + length and self.encodes  # by `_widen`
            kwargs["attention_mask"] = mask if covered else _covering(mask, past + n * self.entered + length, n)
        if positions is not None:
            front = torch.arange(n * self.entered, device=positions.device).expand(len(positions), -1)
            kwargs["position_ids"] = torch.cat([front, positions + n], dim=1)
        if self.entered:
            embeds = embeddings_of(self.model_of[0])(kwargs["input_ids"]) if embeds is None else embeds
            prompt = self.P.to(embeds.dtype).expand(len(embeds), -1, -1)
            kwargs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, embeds], dim=1)}
            if kwargs.get("token_type_ids") is not None:
                kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (n, 0))
        return (), kwargs

    def _leave(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The body's output without the prompt's places."""
        if not self.entered:
            return None
        n = len(self.P)
        if isinstance(output, tuple):
            return output[0][:, n:], *output[1:]
        output.last_hidden_state = output.last_hidden_state[:, n:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(h[:, n:] for h in output.hidden_states)
        return output

    def _pool(self, pooler: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][:, len(self.P) * self.entered :], *args[1:]

    def _widen(self, model: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], Kwargs]:
        """The mask of an encoder-decoder, which its cross-attention uses too."""
        kwargs = _named(model, args, kwargs)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = F.pad(kwargs["attention_mask"], (len(self.P), 0), value=1)
        return (), kwargs


def refuse(cache: Any, mask: Tensor | None, positions: Tensor | None) -> None:
    """Raise Incompatible where a prompt would not be what it is said to be."""
    if getattr(cache, "is_compileable", False):
        raise Incompatible("a preallocated cache has no room for the trained prompt: generate with the default cache")
    if mask is not None and mask.ndim != 2:
        raise Incompatible(f"a trained prompt needs an attention mask of [batch, tokens]; found {mask.ndim} dimensions")
    if mask is None and positions is not None and bool((positions.diff(dim=1) != 1).any()):
        raise Incompatible("a trained prompt stands in front of one document, and this window holds several: give each a row of its own")


def _covering(mask: Tensor, total: int, n: int) -> Tensor:
    """The mask of the text and of what the cache holds of it, with n columns for the prompt: [b, total]."""
    if mask.shape[1] != total - n:
        raise Incompatible(
            f"the attention mask has {mask.shape[1]} columns; with a prompt of {n} there should be {total - n}: "
            "the cache was cropped, or filled while the prompt was not in force"
        )
    return F.pad(mask, (n, 0), value=1)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Kwargs:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def embeddings_of(model: nn.Module) -> nn.Embedding:
    """The input embeddings of a Transformers model."""
    find = getattr(model, "get_input_embeddings", None)
    if find is None:
        raise Incompatible(f"a trained prompt needs a Transformers model; {type(model).__name__} has no get_input_embeddings")
    return find()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PromptSpec:
    """n trained positions, started from the embeddings of random words of the vocabulary or from N(0, std²)."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    n: int
    start: Start = "words"
    std: float = 0.02
    name: str = "prompt"
    requires: frozenset[str] = frozenset()
    kept: str = "its trained prompt stays in front of every input"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise BadParameter(f"n={self.n} is not possible: a prompt has at least one position")

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Prompt:
        prompt, embeddings = Prompt(model, self.n, dtype=dtype, device=device), embeddings_of(model)
        with torch.no_grad():
            if self.start == "words":
                prompt.P.copy_(embeddings(torch.randint(embeddings.num_embeddings, (self.n,), generator=rng).to(device)))
            else:
                prompt.P.copy_(torch.empty(prompt.P.shape, dtype=torch.float64).normal_(0, self.std, generator=rng))
        return prompt

    def count(self, model: nn.Module) -> int:
        return self.n * embeddings_of(model).embedding_dim
