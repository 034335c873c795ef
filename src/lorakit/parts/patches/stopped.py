"""Sublayers whose backward pass is left out: x + f(x) becomes x + stop_gradient(f(x)), with the same bits.

The linear modules of a stopped sublayer (attention: q, k, v, o; MLP: gate, up, down; stacked experts) run without a graph. Nothing in it
is then kept for backward, and no gradient passes through it: only the residual's does. Which ones are stopped is decided before the
forward and remembered in its context, so that activation checkpointing recomputes the same.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.core.context import Cell
from lorakit.core.errors import Incompatible
from lorakit.core.generated import generate
from lorakit.core.shared import Patch
from lorakit.core.site import ATTENTION, MIXTURES, MLP, Kind, Site, sites_of

OUTPUT = {"o", "down"}
NUMBERS = itertools.count()


@dataclass(frozen=True)
class Sublayer:
    """One residual branch: its linear sites, of which the last by role writes to the residual."""

    name: str
    sites: tuple[Site, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that compute it."""
        return tuple(dict.fromkeys(s.module for s in self.sites))

    def flops(self, text: int, active: int) -> float:
        """Multiplications and additions a token: 2 a weight, and in attention 4 · text · width for the scores and their use; `active` is
        the number of experts that a token visits. For a standard block: 8 d² + 4 d · text and 16 d²."""
        scores = sum(4.0 * text * s.d_in for s in self.sites if s.role == "o")
        return scores + sum(2.0 * s.d_in * s.d_out * (1 if s.experts is None else active) for s in self.sites)


def sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """The attention and MLP sublayers of a model, in order."""
    found: dict[str, list[Site]] = {}
    for s in sites_of(model):
        if s.layer is not None and s.rows is None and s.kind != "embedding" and s.role in (*ATTENTION, *MLP):
            found.setdefault(f"{_block(s.name)} {'attention' if s.role in ATTENTION else 'mlp'}", []).append(s)
    whole = tuple(Sublayer(name, tuple(sites)) for name, sites in found.items() if any(s.role in OUTPUT for s in sites))
    if not whole:
        raise Incompatible("this model has no attention or MLP sublayer that lorakit knows: none has an output projection of a known name")
    return whole


def _block(name: str) -> str:
    """The path up to its last number: one layer, or in T5 one sublayer."""
    parts = name.split(".")
    return ".".join(parts[: max(i for i, part in enumerate(parts) if part.isdigit()) + 1])


class Stopped(Patch):
    """`stop(which)` says which sublayers' backward is left out in the training forwards to come."""

    draws = True  # a context of its own for every training forward

    def __init__(self, model: nn.Module, cell: Cell) -> None:
        super().__init__()
        self.cell, self.model_of = cell, (model,)  # in a tuple: not a child
        self.sublayers = sublayers(model)
        self.key = f"stopped {next(NUMBERS)}"  # in a forward's memo
        self.stop([False] * len(self.sublayers))

    def stop(self, which: Sequence[bool]) -> None:
        """One entry a sublayer."""
        self.which = tuple(which)

    def install(self) -> None:
        for i, sublayer in enumerate(self.sublayers):
            for path in sublayer.modules:
                module = self.model_of[0].get_submodule(path)
                if "stopped_as" not in module.__dict__:
                    module.__dict__["stopped_as"] = []
                    module.__class__ = stopping_class(type(module))  # type: ignore[arg-type]  # mypy finds no __hash__ on type[Module]
                module.__dict__["stopped_as"].append((self, i))

    def remove(self) -> None:
        for path in [path for sublayer in self.sublayers for path in sublayer.modules]:
            module: Any = self.model_of[0].get_submodule(path)
            module.stopped_as.remove(next(pair for pair in module.stopped_as if pair[0] is self))
            if not module.stopped_as:
                module.__class__ = type(module).not_stopping
                del module.__dict__["stopped_as"]

    def now(self, i: int) -> bool:
        """Whether the present forward, or the one being recomputed, leaves out sublayer i."""
        which: tuple[bool, ...] = self.cell.value.memo.setdefault(self.key, self.which)
        return which[i]


@functools.cache
def stopping_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of one module class that runs without a graph where its sublayer is stopped."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stop = self.training and any(patch.now(i) for patch, i in self.stopped_as)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop):
            return plain.forward(self, *args, **kwargs)

    return generate("Stopping", stopping_class, plain, forward=forward, not_stopping=plain)


@dataclass(frozen=True)
class StoppedSpec:
    """The patch of all sublayers; a controller says which."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    name: str = "stopped"
    requires: frozenset[str] = frozenset()
    kept: str | None = None

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Stopped:
        return Stopped(model, cell)

    def count(self, model: nn.Module) -> int:
        return 0
