"""N LoRA experts at one site, mixed token by token.

    y = W x + s Σ_i g_i(x) B_i A_i x        A: N × r × d_in, B: N × d_out × r, g: gates [.., N]

Where the gates come from is the subclass's. They depend on the input, so there is no one ΔW to merge; each expert is an ordinary LoRA.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors
from lorakit.core.errors import BadParameter
from lorakit.core.scale import Rank
from lorakit.core.site import Site
from lorakit.ops import reference as ops


@dataclass(frozen=True)
class Form:
    """How many experts, each one's rank and scale, the dropout on their common input, and whether they learn."""

    experts: int
    rank: Rank
    dropout: float = 0.0
    trained: bool = True

    def __post_init__(self) -> None:
        random.check_dropout(self.dropout)
        if self.experts < 1:
            raise BadParameter(f"experts={self.experts} is not possible; a mixture has at least one expert")

    def count(self, site: Site) -> int:
        """Trained numbers of the experts at a site."""
        return self.experts * self.rank.at(site)[0] * (site.d_in + site.d_out) if self.trained else 0


class Experts(Delta, ABC):
    """One site's A [N, r, d_in] and B [N, d_out, r]."""

    linear = False
    provides = frozenset({"experts"})

    def __init__(self, site: Site, form: Form, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        (self.r, self.s), n, self.site = form.rank.at(site), form.experts, site
        self.p, self.stream, self.draws = form.dropout, random.stream(site.name), form.dropout > 0
        self.trains = frozenset({"A", "B"}) if form.trained else frozenset()
        self.A = nn.Parameter(torch.zeros(n, self.r, site.d_in, dtype=dtype, device=device), requires_grad=form.trained)
        self.B = nn.Parameter(torch.zeros(n, site.d_out, self.r, dtype=dtype, device=device), requires_grad=form.trained)

    @abstractmethod
    def gates(self, x: Tensor, ctx: Ctx) -> Tensor:
        """[.., N] for the site's input [.., d_in] (ids [..] at an embedding)."""

    def drop(self, x: Tensor, ctx: Ctx) -> Tensor:
        """The input as it is: a router reads all of it, and `forward` drops what the experts read."""
        return x

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else self.B.dtype
        gates = self.gates(x, ctx).to(dtype)
        return ops.mixture(super().drop(x, ctx), gates, self.A.to(dtype), self.B.to(dtype), self.s)

    def experts(self) -> tuple[Factors, ...]:
        return tuple(Factors(A, B, self.s) for A, B in zip(self.A, self.B, strict=True))


class ExpertsSpec(DeltaSpec, ABC):
    """What all mixtures of experts say of themselves."""

    @property
    def provides(self) -> frozenset[str]:
        return Experts.provides

    @property
    def linear(self) -> bool:
        return False

    @property
    def beyond(self) -> str:
        return "its experts are mixed by gates that depend on the input, so that no one weight holds them (one expert alone is a LoRA)"
