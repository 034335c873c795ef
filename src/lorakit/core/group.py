"""Which adapted modules read the same input: a pass over an attached model that no method sees.

A group's outputs are handed over while the parent module runs and at no other time, so that a recomputation does as the forward did, and
modules that are called one by one are on their own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.core.layer import Branch, Group, Slot

SHARED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
"""Roles whose modules read one input where they have one parent. One that is given another computes alone, and the first in vain."""
ACROSS = ("cross", "encdec", "encoder_attn")
"""What the parent's name says where keys and values come from elsewhere than queries."""


KEYS = {"attention": -1, "mlp": -2}
"""Of the hooks. torch would number them, and a compiler would look at the number: every layer would be compiled by itself."""


def group(model: nn.Module, slots: Iterable[Slot]) -> list["Hung"]:
    """Tell every slot which others usually read what it reads. Returns what was hung on their parents for it."""
    found: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots:
        slot.group = None
        branch = next(iter(slot.branches.values()), None)
        parent = slot.path.rpartition(".")[0]
        if isinstance(branch, Branch) and not any(word in parent.lower() for word in ACROSS) and (family := SHARED.get(branch.site.role)):
            found.setdefault((parent, family), []).append(slot)
    hung = []
    for (parent, family), members in found.items():
        if len(members) > 1:
            one = Group(members)
            for slot in members:
                slot.group = one
            hung.append(Hung(model.get_submodule(parent), KEYS[family]))
            hung[-1].hang(one)
    return hung


@dataclass(frozen=True)
class Hung:
    """The hooks of a group on its parent."""

    module: nn.Module
    key: int

    def hang(self, group: Group) -> None:
        """Put them there; the one afterwards is called whether or not forward failed."""
        self.module._forward_pre_hooks[self.key] = Open(group)
        self.module._forward_hooks[self.key] = Close(group)
        self.module._forward_hooks_always_called[self.key] = True

    def remove(self) -> None:
        """Take them away."""
        for hooks in (self.module._forward_pre_hooks, self.module._forward_hooks, self.module._forward_hooks_always_called):
            hooks.pop(self.key, None)


class Open:
    """The hook before the parent runs."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.group.left, self.group.led = {}, False


class Close(Open):
    """The hook after it, whether or not it failed."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if not torch.compiler.is_compiling():
            self.group.left = None
