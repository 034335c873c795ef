"""MELoRA: an ensemble of n mini-LoRAs, one on each diagonal block of W.

    y = W x + s · [B₁A₁ x̃₁; …; BₙAₙ x̃ₙ] + bias        x̃ = dropout(x) = [x̃₁; …; x̃ₙ],  s = alpha / r
    ΔW = s · blockdiag(B₁A₁, …, BₙAₙ)        Aᵢ: r × d_in/n, Bᵢ: d_out/n × r        rank n·r

n times LoRA's rank for LoRA's r (d_in + d_out) parameters; what W needs off the diagonal blocks cannot be learned at all. The minis lie
side by side in tensors of LoRA's shapes: Aᵢ is the i-th block of columns of A [r, d_in], Bᵢ the i-th block of rows of B [d_out, r], so that
n = 1 is LoRA, bit for bit. `n` must divide d_in and d_out of every site. An id at an embedding belongs to the mini of its vocabulary block.
As plain LoRA it has rank n·r, with block-diagonal factors.
Trained: A and B. Each mini starts as a LoRA of its own: Aᵢ ~ U(±√(n / d_in)), B = 0. All minis have one rank (the paper lets them differ).
Defaults: r 8, n 2, alpha 16 (the official GLUE scripts, on q and v with dropout 0.05; the instruction-tuning script has r 1, n 8).
References: arXiv:2402.17263; survey 3.1.1.

Use it when rank is what you lack and parameters are what you count: n minis have n times LoRA's rank for the same number. Not when the
update mixes features far apart: what lies off the diagonal blocks cannot be learned at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors
from lorakit.core.errors import BadParameter
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.ops import reference as ops
from lorakit.parts.inits.random import Kaiming


class Minis(Delta):
    """One site's A [r, d_in] and B [d_out, r], each of n blocks."""

    trains = frozenset({"A", "B"})

    def __init__(self, site: Site, spec: "MinisSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.n, (self.r, self.s) = spec.n, spec.rank.at(site)
        self.p, self.stream, self.draws = spec.dropout, random.stream(site.name), spec.dropout > 0
        self.provides = spec.provides
        self.A = nn.Parameter(torch.zeros(self.r, site.d_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(site.d_out, self.r, dtype=dtype, device=device))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else self.B.dtype
        z = self._down(x, self.A.to(dtype))  # n of [.., r]
        minis = [ops.expand(zi, Bi, self.s) for zi, Bi in zip(z, self.B.to(dtype).chunk(self.n), strict=True)]
        return torch.cat(minis, -1)

    def _down(self, x: Tensor, A: Tensor) -> list[Tensor]:
        if x.is_floating_point():
            return [ops.project(xi, Ai) for xi, Ai in zip(x.chunk(self.n, -1), A.chunk(self.n, 1), strict=True)]
        z, mini = ops.project(x, A), x // (A.shape[1] // self.n)
        return [z * (mini == i).unsqueeze(-1) for i in range(self.n)]

    def weight(self) -> Tensor:
        blocks = [Bi @ Ai for Bi, Ai in zip(self.B.chunk(self.n), self.A.chunk(self.n, 1), strict=True)]
        delta: Tensor = torch.block_diag(*blocks)
        return self.s * delta

    def factors(self) -> Factors:
        return Factors(torch.block_diag(*self.A.chunk(self.n, 1)), torch.block_diag(*self.B.chunk(self.n)), self.s)

    def bound(self) -> int:
        return self.n * self.r


@dataclass(frozen=True)
class MinisSpec(DeltaSpec):
    """The rank and scale of a mini, how many there are, input dropout."""

    rank: Rank
    n: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        random.check_dropout(self.dropout)

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"factors", "minis"})

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Minis:
        return Minis(site, self, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.rank.check(sites)
        for site in sites:
            rest = math.gcd(site.d_in, site.d_out)
            if rest % self.n:
                raise BadParameter(
                    f"n={self.n} does not divide both sides of site {site.name!r} ({site.d_out} × {site.d_in}); "
                    f"use a divisor of {rest}, or leave the site out"
                )
            r, most = self.rank.at(site)[0], min(site.d_in, site.d_out) // self.n
            if r > most:
                raise BadParameter(f"r={r} exceeds a block of site {site.name!r} ({site.d_out} × {site.d_in}, n={self.n}); use r <= {most}")

    def count(self, site: Site) -> int:
        return self.rank.at(site)[0] * (site.d_in + site.d_out)


@dataclass(frozen=True)
class EachKaiming:
    """LoRA's start in every mini: with d_in / n inputs, A is √n times as large."""

    requires: frozenset[str] = frozenset({"minis"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Minis)
        Kaiming()(delta, base, site, rng)
        with torch.no_grad():
            delta.A.mul_(math.sqrt(delta.n))


@method("melora", paper="arXiv:2402.17263", survey="3.1.1", kind="delta")
def melora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    n: int = 2,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """n LoRAs of rank r side by side on the diagonal blocks of W: rank n·r for the parameters of rank r."""
    if n < 1:
        raise BadParameter(f"n={n} is not possible; n minis, at least 1 (which is LoRA)")
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    return Method(MinisSpec(rank, n, dropout), EachKaiming(), sites=sites, unfreeze=unfreeze)
