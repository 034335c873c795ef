"""A causal model's head apart from its body: the hidden states that the head is given, where the logits are exactly head(hidden).

That is asked of the model itself, not of a list of names: its own forward is run around a body and a head that compute nothing, and a model
that scales, caps or shifts what the head returns answers no. Every forward after that is the model's own, hooks and all, but for the head,
which passes on what it is given.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorakit.core.layer import Branch, Slot

_DIRECT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What models have answered."""


def head_and_hidden(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[nn.Linear, Tensor] | None:
    """The head and, from one forward, its input with its graph; None where the logits themselves must be asked for."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or torch.is_inference_mode_enabled():
        return None
    if not _is_alone(model, head) or not _is_row_by_row(head):
        return None
    if model not in _DIRECT:
        _DIRECT[model] = _is_direct(model, head)
    hidden = _hidden(model, head, inputs) if _DIRECT[model] else None
    _DIRECT[model] = hidden is not None  # its configuration may have changed since it was asked
    return None if hidden is None else (head, hidden)


def _is_alone(model: nn.Module, head: nn.Linear) -> bool:
    """Whether nobody watches the head or runs it in another way: its hooks are promised one call a forward, with all rows."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in head.modules())
    compiled = model._compiled_call_impl is not None or head._compiled_call_impl is not None
    return not hooked and not compiled and "forward" not in head.__dict__


def _is_row_by_row(head: nn.Linear) -> bool:
    """Whether the head's adapters change each row by itself and find all they need in it: masks follow a row's place among all rows, and
    what is read elsewhere belongs to the graph of the whole forward."""
    slot = head._modules.get("lora")
    if not isinstance(slot, Slot):
        return True
    branches: list[Any] = [slot.branches[key] for key in slot.active]
    return slot.path not in slot.cell.reads and not (branches and head.training and slot.cell.draws) and all(map(_is_change, branches))


def _is_change(branch: Branch) -> bool:
    return branch.delta.linear and not branch.delta.reads


class _Body:
    """What a body returns: hidden states, and nothing else that one may ask for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _is_direct(model: Any, head: nn.Linear) -> bool:
    """Whether what the head returns leaves the model as its logits, untouched."""
    body, like = model.base_model, next(p for p in model.parameters() if p.is_floating_point())
    hidden = torch.zeros(1, 2, head.in_features, dtype=like.dtype, device=like.device)
    given = torch.zeros(1, 2, head.out_features, dtype=like.dtype, device=like.device)
    before = given._version
    with _aside(model, body), _instead(body, lambda *args, **kwargs: _Body(hidden)), _instead(head, lambda x: given):
        try:
            found = type(model).forward(model, input_ids=torch.zeros(1, 2, dtype=torch.long, device=like.device)).logits
        except Exception:  # a forward that wants more of its body: the logits it is
            return False
    return _is_same(found, given, before)


def _is_same(found: Tensor, given: Tensor, version: int) -> bool:
    """The same tensor, and not written into since."""
    return found is given and found._version == version


def _hidden(model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> Tensor | None:
    """What the head was given, if the model then took it for its logits."""
    seen: list[tuple[Tensor, int]] = []

    def pass_on(hidden: Tensor) -> Tensor:
        seen.append((hidden, hidden._version))
        return hidden

    with _instead(head, pass_on):
        found: Tensor = model(**inputs).logits
    return found if len(seen) == 1 and _is_same(found, *seen[0]) else None


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward: an instance's own comes before its class's."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


@contextmanager
def _aside(model: nn.Module, body: nn.Module) -> Iterator[None]:
    """What is not in the body in eval mode, no adapter active, and nobody looking on: who counts what a model sees must not count this."""
    inner = set(body.modules()) - {body}
    modules = [module for module in model.modules() if module not in inner]
    before = [(module, {name: module.__dict__[name] for name in _quiet(module)}) for module in modules]
    try:
        for module in modules:
            module.__dict__.update(_quiet(module))
        yield
    finally:
        for module, found in before:
            module.__dict__.update(found)


def _quiet(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that is aside."""
    silent: dict[str, Any] = {"active": ()} if isinstance(module, Slot) else {}
    return silent | {"training": False, "_forward_pre_hooks": OrderedDict(), "_forward_hooks": OrderedDict()}
