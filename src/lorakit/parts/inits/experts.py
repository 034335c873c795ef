"""Experts start as ordinary LoRAs, each with draws of its own: A random, B zero. A router that reads the input starts as a linear layer.

With B = 0 no task gradient reaches a router: what an expert adds, and so what choosing it changes, is zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.delta import Delta
from lorakit.core.site import Site
from lorakit.parts.inits.random import normal, set_


@dataclass(frozen=True)
class FreshExperts:
    """A_i ~ U(±1/√d_in), B_i = 0; at an embedding A_i = 0, B_i ~ N(0, 1). With a `router`, R ~ U(±1/√d_in)."""

    router: bool
    requires: frozenset[str] = frozenset({"experts"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        A: Tensor = delta.get_parameter("A")
        bound = 1 / math.sqrt(site.d_in)
        if site.kind == "embedding":
            set_(delta.get_parameter("B"), normal(delta.get_parameter("B"), 1.0, rng))
        else:
            set_(A, torch.empty(A.shape).uniform_(-bound, bound, generator=rng))
        if self.router:
            R = delta.get_parameter("R")
            set_(R, torch.empty(R.shape).uniform_(-bound, bound, generator=rng))
