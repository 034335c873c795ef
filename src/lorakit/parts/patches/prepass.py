"""A pass over the base before each forward of the model, from whose last hidden state something is decided for the forward proper.

    H = body(inputs), adapters off, no gradient        H: [b, t, d]        ctx.memo["gates"] = decide(H)

In decoding the base pass has keys and values of its own: layers behind the cache's own ones, so that whatever reorders, crops or repeats
the cache does the same to them, and every token is read once by either pass. The pass runs in the model's mode, so it has dropout where
the model has.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.context import Cell, Ctx
from lorakit.core.errors import Incompatible
from lorakit.core.layer import Slot
from lorakit.core.shared import Patch

GATES = "gates"
OWN = "layers_of_the_forward"
"""On a cache: how many of its layers are the forward's; the base pass has the others."""
Kwargs = dict[str, Any]


class Prepass(Patch, ABC):
    """`decide` is the subclass's; `meanwhile` is what the adapter's sites find in the base pass, None to leave all adapters out of it."""

    meanwhile: Tensor | None = None

    def __init__(self, model: nn.Module, cell: Cell) -> None:
        super().__init__()
        check(model)
        self.model_of, self.cell = (model,), cell  # in a tuple: not a child
        self.handles, self.before, self.slots = list[Any](), list[Ctx](), list[Slot]()

    @abstractmethod
    def decide(self, hidden: Tensor) -> Tensor:
        """What the forward proper finds in its context, from the last hidden state [b, t, d]."""

    def install(self) -> None:
        model: Any = self.model_of[0]
        self.slots = [module for module in model.modules() if isinstance(module, Slot)]
        self.handles.append(model.register_forward_pre_hook(self._enter))
        self.handles.append(model.register_forward_hook(self._leave, always_call=True))
        self.handles.append(model.base_model.register_forward_pre_hook(self._decide, with_kwargs=True))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """A memo for this forward alone: two forwards under one context must not read each other's gates."""
        self.before.append(self.cell.value)
        self.cell.value = replace(self.cell.value, memo={k: v for k, v in self.cell.value.memo.items() if k != GATES})

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.before:
            self.cell.value = self.before.pop()

    def _decide(self, body: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[tuple[Any, ...], Kwargs]:
        if self.before and GATES in self.cell.value.memo:
            raise Incompatible("two active adapters each make a pass over the base; switch to one of them")
        kwargs = dict(zip(_names(body), args, strict=False)) | kwargs
        own = self._cached(body, kwargs)
        with torch.no_grad(), self._base():
            out = body.forward(**kwargs | own)
        hidden = out[0] if isinstance(out, tuple) else out.last_hidden_state
        self._say(self.decide(hidden))
        return (), kwargs

    def _cached(self, body: nn.Module, kwargs: Kwargs) -> Kwargs:
        """The base pass's cache, and room for it in the forward's; neither where nothing is cached."""
        names, model = _names(body), self.model_of[0]
        if "past_key_values" not in names:
            return {}
        if kwargs.get("past_key_values") is None and self._caches(model, kwargs):
            from transformers import DynamicCache

            config: Any = model.config
            kwargs["past_key_values"] = DynamicCache(config=config)
        cache = kwargs.get("past_key_values")
        own = {"past_key_values": None if cache is None else behind(cache, model.config)}
        return own | ({"use_cache": cache is not None} if "use_cache" in names else {})

    def _caches(self, model: Any, kwargs: Kwargs) -> bool:
        asked = kwargs.get("use_cache")
        asked = getattr(model.config, "use_cache", False) if asked is None else asked
        return bool(asked) and not model.training and model.can_generate()

    @contextmanager
    def _base(self) -> Iterator[None]:
        """The model without adapters, or with this one's sites reading `meanwhile`."""
        if self.meanwhile is not None:
            self._say(self.meanwhile)
            yield
            return
        active = [slot.active for slot in self.slots]
        try:
            for slot in self.slots:
                slot.active = ()
            yield
        finally:
            for slot, names in zip(self.slots, active, strict=True):
                slot.active = names

    def _say(self, gates: Tensor) -> None:
        self.cell.value = replace(self.cell.value, memo={**self.cell.value.memo, GATES: gates})


def told(ctx: Ctx, site: str) -> Tensor:
    """What the forward was told. Raises Incompatible outside a forward of the model."""
    if GATES not in ctx.memo:
        raise Incompatible(
            f"site {site!r} ran outside a forward of the model, where a pass over the base decides first: call the model itself"
        )
    gates: Tensor = ctx.memo[GATES]
    return gates


def check(model: nn.Module) -> None:
    """Raise Incompatible for a model without one body whose last hidden state can be read."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder" if config is not None else "no Transformers model"
        raise Incompatible(f"a pass over the base reads the hidden state of a decoder or an encoder; {type(model).__name__} is {what}")


def behind(cache: Any, config: Any) -> Any:
    """The part of a cache that is the base pass's, as a cache; made at the cache's first use. It lives and moves with the cache."""
    layers: Sequence[Any] | None = getattr(cache, "layers", None)
    if layers is None:
        raise Incompatible(f"a pass over the base needs a cache of layers beside the forward's; {type(cache).__name__} has none")
    if OWN not in vars(cache):
        _widen(cache, config)
    n: int = vars(cache)[OWN]
    view = copy.copy(cache)
    view.layers = cache.layers[n:]
    return view


def _widen(cache: Any, config: Any) -> None:
    if cache.get_seq_length():
        raise Incompatible(
            "the cache was filled while the adapter was not in force, so the base pass has not read its tokens; start it anew"
        )
    while cache.layer_class_to_replicate is not None and len(cache.layers) < config.get_text_config().num_hidden_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    vars(cache)[OWN] = len(cache.layers)
    cache.layers.extend([copy.deepcopy(layer) for layer in cache.layers])


def _names(body: nn.Module) -> list[str]:
    return list(inspect.signature(body.forward).parameters)
