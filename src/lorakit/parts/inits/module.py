"""How adapter modules start: silent (B = 0), or near to it. Biases are zero and a norm's weights one, as built."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter
from lorakit.core.site import Site
from lorakit.parts.inits.random import set_


@dataclass(frozen=True)
class Silent:
    """A ~ U(±1/√d), B = 0: the output is the base's, bit for bit (He et al. 2021, "lora" init)."""

    requires: frozenset[str] = frozenset({"dense module"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        A: Tensor = delta.A  # type: ignore[assignment]
        bound = 1 / math.sqrt(A.shape[1])
        set_(A, torch.empty(A.shape).uniform_(-bound, bound, generator=rng))


@dataclass(frozen=True)
class Near:
    """A, B ~ N(0, std²) truncated at two std: nearly the identity (Houlsby et al. 2019, section 3.6 and official code)."""

    std: float
    requires: frozenset[str] = frozenset({"dense module"})

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise BadParameter(f"std={self.std} is not possible with init='near'; expected a small number such as 0.01")

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        for name in "AB":
            tensor: Tensor = getattr(delta, name)
            set_(tensor, truncated(tensor, self.std, rng))


def truncated(like: Tensor, std: float, rng: torch.Generator) -> Tensor:
    """N(0, std²) of `like`'s shape, truncated at two std, drawn on the CPU."""
    return torch.nn.init.trunc_normal_(torch.empty(like.shape), 0.0, std, -2 * std, 2 * std, generator=rng)


@dataclass(frozen=True)
class Glorot:
    """Every S_i and T_i of both projections U(±√2 · √(6 / (fan_in + fan_out))) on its own; BT = 0 with `silent`."""

    silent: bool = True
    requires: frozenset[str] = frozenset({"hypercomplex"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        for name in ("AS", "AT", "BS", "BT"):
            tensor: Tensor = getattr(delta, name)
            bound = math.sqrt(2) * math.sqrt(6 / sum(tensor.shape[1:]))
            drawn = torch.empty(tensor.shape).uniform_(-bound, bound, generator=rng)
            if name != "BT" or not self.silent:
                set_(tensor, drawn)
