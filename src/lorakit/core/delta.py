"""A delta owns A and B: the trained part of an adapted site, ΔW = s · B · G · A, or any other linear change of the weight."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lorakit.core.context import Ctx
from lorakit.core.site import Site


class Factors(NamedTuple):
    """ΔW = s · B · A exactly, where `gain` is None; else W' = gain ∘ (W + s · B · A) row by row (DoRA)."""

    A: Tensor
    """r × d_in; a gate is already folded in."""
    B: Tensor
    """d_out × r."""
    s: float
    gain: Tensor | None = None
    """d_out, or None."""


class Delta(nn.Module, ABC):
    """A site's trained change of the weight. Its tensors are its state; `trains` says which of them learn."""

    provides: frozenset[str] = frozenset()
    trains: frozenset[str] = frozenset()
    draws: bool = False
    """Whether forward in training draws masks, so that every step needs a fresh context."""

    def drop(self, x: Tensor, ctx: Ctx) -> Tensor:
        """The input as the delta sees it in training (dropout); the identity by default and always in eval mode."""
        return x

    @abstractmethod
    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x ΔWᵀ of an already dropped x: [.., d_in] -> [.., d_out] (ids [..] for an embedding)."""

    @abstractmethod
    def weight(self) -> Tensor:
        """ΔW: d_out × d_in, in the delta's own dtype."""

    @abstractmethod
    def bound(self) -> int:
        """An upper bound of rank(ΔW) at any time."""

    def factors(self) -> Factors | None:
        """(A, B, s) with ΔW = s·B·A exactly, or None when the delta has no factors."""
        return None

    def roles(self) -> dict[str, str]:
        """{parameter name: role}; optimizers and penalties ask by role."""
        return {name: name for name, _ in self.named_parameters(recurse=False)}


class DeltaSpec(Protocol):
    """What a recipe holds: a value that builds the delta of one site, uninitialized."""

    @property
    def provides(self) -> frozenset[str]: ...

    def build(self, site: Site, *, dtype: torch.dtype, device: torch.device) -> Delta: ...

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BadParameter for what cannot be built at these sites, or names none of them."""

    def count(self, site: Site) -> int:
        """Trainable parameters at this site, in closed form."""
