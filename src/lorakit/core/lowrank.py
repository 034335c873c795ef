"""The delta of nearly the whole survey: ΔW = s · (B · diag(g) · A − B₀ · A₀).

A, B trained, frozen or gated by g; the anchor (A₀, B₀), where there is one, is what an init that starts at W's own components subtracts,
so that ΔW = 0 at the start and the base is never touched (PiSSA: 2404.02948). An anchored delta is plain LoRA of rank 2r:
B' = [B, −B₀], A' = [A; A₀].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, Factors
from lorakit.core.errors import BadParameter
from lorakit.core.scale import Rank
from lorakit.core.site import Site
from lorakit.ops import reference as ops


class LowRank(Delta):
    """One site's A [r, d_in], B [d_out, r], and optionally g [r], A0 [r, d_in], B0 [d_out, r]."""

    A: nn.Parameter
    B: nn.Parameter
    g: nn.Parameter | None
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, site: Site, spec: "LowRankSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.r, self.s = spec.rank.at(site)
        self.p, self.stream = spec.dropout, random.stream(site.name)
        self.draws = spec.dropout > 0
        self.provides, self.trains = spec.provides, frozenset(spec.train)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.A = nn.Parameter(empty(self.r, site.d_in), requires_grad="A" in self.trains)
        self.B = nn.Parameter(empty(site.d_out, self.r), requires_grad="B" in self.trains)
        self.register_parameter("g", nn.Parameter(empty(self.r), requires_grad="g" in self.trains) if spec.gate else None)
        self.register_buffer("A0", empty(self.r, site.d_in) if spec.anchor else None)
        self.register_buffer("B0", empty(site.d_out, self.r) if spec.anchor else None)

    def drop(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Dropout on the delta's input only; ids cannot be dropped, so an embedding ignores it."""
        if self.p == 0 or not self.training or not x.is_floating_point():
            return x
        return random.dropout(x, ctx.key, self.stream, self.p)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        A, B = self._down(), self._up()
        dtype = x.dtype if x.is_floating_point() else B.dtype
        z = ops.project(x, A.to(dtype))  # [.., r]; 2r wide with an anchor
        return ops.expand(z, B.to(dtype), self.s)

    def weight(self) -> Tensor:
        delta = self.B @ (self.A if self.g is None else self.g[:, None] * self.A)
        if self.A0 is not None and self.B0 is not None:
            delta = delta - self.B0 @ self.A0
        return self.s * delta

    def factors(self) -> Factors:
        return Factors(self._down(), self._up(), self.s)

    def bound(self) -> int:
        return self.r * (1 if self.A0 is None else 2)

    def _down(self) -> Tensor:
        A = self.A if self.g is None else self.g[:, None] * self.A
        return A if self.A0 is None else torch.cat([A, self.A0])

    def _up(self) -> Tensor:
        return self.B if self.B0 is None else torch.cat([self.B, -self.B0], dim=1)


@dataclass(frozen=True)
class LowRankSpec:
    """Rank and scale, input dropout, what is trained, whether there is a gate g, whether the init leaves an anchor."""

    rank: Rank
    dropout: float = 0.0
    train: tuple[str, ...] = ("A", "B")
    gate: bool = False
    anchor: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise BadParameter(f"dropout={self.dropout} is not a probability; expected 0 <= dropout < 1")

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"factors"} | ({"gate"} if self.gate else set()) | ({"anchor"} if self.anchor else set()))

    def build(self, site: Site, *, dtype: torch.dtype, device: torch.device) -> LowRank:
        return LowRank(site, self, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.rank.check(sites)

    def count(self, site: Site) -> int:
        r, _ = self.rank.at(site)
        return r * (site.d_in * ("A" in self.train) + site.d_out * ("B" in self.train) + ("g" in self.train))
