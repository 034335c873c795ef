"""How a delta meets the frozen output: the combine returns what is added to y = W x + bias.

Returning the change, not the sum, makes a frozen output bit-exact at init, lets several adapters of one site add up, and gives
`scale(name, w)` one meaning for every method: y + w · change.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta
from lorakit.core.site import MIXTURES, Kind, Site


class Combine(nn.Module, ABC):
    """Owns γ. `y` is the frozen output W x + bias at this site, [.., d_out]."""

    trains: frozenset[str] = frozenset()
    fuses: bool = False
    """Whether the output is γ ∘ (W x + delta(x)) + bias with γ = `gain`, at the scale 1 and without dropout where it `rescales`."""
    rescales: bool = False
    """Whether there is a γ."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, base: Base, delta: Delta, ctx: Ctx) -> Tensor:
        """The change of the output: [.., d_out]."""

    @abstractmethod
    def weight(self, base: Base, delta: Delta) -> Tensor:
        """The change of the weight, d_out × d_in, so that forward equals x · weightᵀ (dropout aside)."""

    def gain(self, base: Base, delta: Delta) -> Tensor | None:
        """γ [d_out], or None when the update is plain addition."""
        return None

    def bias(self, base: Base, delta: Delta) -> Tensor | None:
        """The change of the module's bias, d_out, or None."""
        return None

    def roles(self) -> dict[str, str]:
        """{parameter name: role}."""
        return {name: name for name, _ in self.named_parameters(recurse=False)}


class CombineSpec(Protocol):
    """A value that builds a site's combine."""

    @property
    def requires(self) -> frozenset[str]: ...

    def build(self, site: Site, base: Base, delta: Delta) -> Combine: ...

    def count(self, site: Site) -> int: ...

    def full_rank(self) -> bool:
        """Whether the change of the weight may exceed the delta's rank."""


class Add(Combine):
    """y + x ΔWᵀ."""

    fuses = True

    def forward(self, x: Tensor, y: Tensor, base: Base, delta: Delta, ctx: Ctx) -> Tensor:
        return delta(delta.drop(x, ctx), ctx)  # type: ignore[no-any-return]

    def weight(self, base: Base, delta: Delta) -> Tensor:
        return delta.weight()


@dataclass(frozen=True)
class AddSpec:
    """Plain addition."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    requires: frozenset[str] = frozenset()

    def build(self, site: Site, base: Base, delta: Delta) -> Add:
        return Add()

    def count(self, site: Site) -> int:
        return 0

    def full_rank(self) -> bool:
        return False
