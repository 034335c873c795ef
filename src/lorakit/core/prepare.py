"""Before each forward of an adapted model: fresh masks, a fresh memo, and checkpointing that recomputes under the forward's own context."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorakit.core.context import Cell, Ctx
from lorakit.core.errors import Incompatible
from lorakit.core.site import ROOT


class Prepare:
    """The hook on the model."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self.cell.reads:
            self.cell.value = replace(self.cell.value, memo={})
        if model.training:
            if self.cell.draws and not self.cell.given:  # a delta without masks leaves the base's own dropout as it was
                self.cell.value = Ctx(torch.stack([torch.zeros((), dtype=torch.int64), torch.randint(2**31, ())]))
            if not torch.compiler.is_compiling():
                _carry_context(model, self.cell)


def own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The model's modules without the adapters', which may be many more. One that is in several places comes several times."""
    yield module
    for name, child in module._modules.items():
        if child is not None and name not in ("lora", ROOT):
            yield from own_modules(child)


def _carry_context(model: nn.Module, cell: Cell) -> None:
    for module in own_modules(model):
        func = getattr(module, "_gradient_checkpointing_func", None)
        if func is None or not getattr(module, "gradient_checkpointing", False) or "context_fn" in getattr(func, "keywords", {}):
            continue
        if getattr(func, "keywords", {}).get("use_reentrant", True):
            raise Incompatible(
                "reentrant activation checkpointing cannot restore an adapter's context; "
                "use model.activation_checkpointing_enable({'use_reentrant': False})"
            )
        module._gradient_checkpointing_func = functools.partial(func.func, *func.args, **func.keywords, context_fn=cell.checkpoint_contexts)  # type: ignore[assignment]


def leave_context(model: nn.Module, cell: Cell) -> None:
    for module in model.modules():
        func = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(func, "keywords", {}).get("context_fn") == cell.checkpoint_contexts:
            rest = {k: v for k, v in func.keywords.items() if k != "context_fn"}  # type: ignore[union-attr]
            module._gradient_checkpointing_func = functools.partial(func.func, *func.args, **rest)  # type: ignore[union-attr, assignment]


def tied_modules(model: nn.Module) -> set[nn.Module]:
    """Modules whose `weight` is also another module's."""
    owners: dict[int, set[nn.Module]] = {}
    for module in own_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), set()).add(module)
    return {m for modules in owners.values() if len(modules) > 1 for m in modules}
