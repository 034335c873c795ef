"""Random starts with ΔW = 0: one factor drawn, the other zero. All draws are on the CPU in fp32, so CPU and GPU get the same bits."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter
from lorakit.core.site import MIXTURES, Kind, Site


def set_(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a delta's tensor, keeping its dtype and device."""
    with torch.no_grad():
        tensor.copy_(values)


def normal(like: Tensor, std: float, rng: torch.Generator) -> Tensor:
    """N(0, std²) of `like`'s shape, drawn on the CPU."""
    return torch.empty(like.shape).normal_(0, std, generator=rng)


@dataclass(frozen=True)
class Kaiming:
    """A ~ U(±1/√d_in), B = 0 (loralib, PEFT); at an embedding A = 0, B ~ N(0, 1), as both do there, or the reverse where only B learns."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    neutral: ClassVar[bool] = True
    embedding: Literal["A", "B"] = "B"
    requires: frozenset[str] = frozenset({"factors"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        if site.kind == "embedding":
            drawn: Tensor = getattr(delta, self.embedding)
            set_(drawn, normal(drawn, 1.0, rng))
        else:
            bound = 1 / math.sqrt(site.d_in)
            set_(delta.A, torch.empty(delta.A.shape).uniform_(-bound, bound, generator=rng))  # type: ignore[arg-type]


@dataclass(frozen=True)
class OneSided:
    """Init[A]: A ~ N(0, 1/d_in), B = 0. Init[B]: A = 0, B ~ N(0, 1/r). arXiv:2406.08447, section 2."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    factor: Literal["A", "B"]
    requires: frozenset[str] = frozenset({"factors"})

    def __post_init__(self) -> None:
        if self.factor not in ("A", "B"):
            raise BadParameter(f"init={self.factor!r}; expected 'A' (A random, B zero) or 'B' (A zero, B random)")

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        fan_in = site.d_in if self.factor == "A" else delta.B.shape[-1]  # type: ignore[index]
        tensor: Tensor = getattr(delta, self.factor)
        set_(tensor, normal(tensor, 1 / math.sqrt(fan_in), rng))


@dataclass(frozen=True)
class Gaussian:
    """A, B ~ N(0, std²) and the gate zero: AdaLoRA's start (arXiv:2303.10512)."""

    std: float = 0.02
    requires: frozenset[str] = frozenset({"factors", "gate"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        for tensor in (delta.A, delta.B):
            set_(tensor, normal(tensor, self.std, rng))  # type: ignore[arg-type]
