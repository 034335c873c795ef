"""KronA: the update as a Kronecker product of two small matrices.

    y = W x + scaling · (w1 ⊗ w2) dropout(x) + bias        w1: a₁ × a₂, w2: b₁ × b₂        a₁ b₁ = d_out, a₂ b₂ = d_in
    (w1 ⊗ w2) x = w1 X w2ᵀ, row by row, with X: a₂ × b₂ the entries of x row by row

The product is never formed in forward. Its rank is rank(w1) · rank(w2), so ΔW can have full rank; it is a grid of a₁ × a₂ multiples of one
block w2. `factor_out` and `factor_in` are a₁ and a₂ where they divide d_out and d_in, else the largest divisor that exceeds neither the
factor nor the side's square root; −1 is the divisor nearest below the square root. A side of prime length has the divisor 1 alone; a site
where w2 would be as large as W is refused.
That is PEFT's LoKr with two full factors: factor_out = factor_in = decompose_factor, scaling = alpha / r, names and start included. As
plain LoRA it has rank min(a₁, a₂) · min(b₁, b₂), with factors whose size is that of ΔW.
Trained: w1 and w2, a₁ a₂ + b₁ b₂ parameters a site. w1 = 0 and w2 ~ U(±1/√b₂), so ΔW = 0; at an embedding w2 ~ N(0, 1), as LoRA's B.
Left out of the paper: KronAᴮ, a bottleneck module beside the feed-forward block, and KronAᴮ_res with its learned residual scale; neither is
a change of a weight.
Defaults: shapes near the square root and scaling 1, our reading: the paper tunes both.
References: arXiv:2212.10650; survey 2.1.

Use it when the adapter must be tiny and still of full rank, as for many tenants; expect to search for its rate anew (some five times LoRA's
in our tests). Exported as plain LoRA it is as large as the weight itself, so keep it in its own or PEFT's LoKr form.
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
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.ops import reference as ops
from lorakit.parts.inits.random import normal, set_

Shapes = tuple[tuple[int, int], tuple[int, int]]


class Kronecker(Delta):
    """One site's w1 [a₁, a₂] and w2 [b₁, b₂]."""

    trains = frozenset({"w1", "w2"})

    def __init__(self, site: Site, spec: "KroneckerSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.s, self.provides = spec.scaling, spec.provides
        self.p, self.stream, self.draws = spec.dropout, random.stream(site.name), spec.dropout > 0
        first, second = spec.shapes(site)
        self.w1 = nn.Parameter(torch.zeros(first, dtype=dtype, device=device))
        self.w2 = nn.Parameter(torch.zeros(second, dtype=dtype, device=device))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else self.w2.dtype
        return ops.kronecker(x, self.w1.to(dtype), self.w2.to(dtype), self.s)

    def weight(self) -> Tensor:
        return torch.kron(self.w1, self.w2) * self.s

    def factors(self) -> Factors:
        """w = P Q with the smaller side's identity as one of the two: (P₁ ⊗ P₂)(Q₁ ⊗ Q₂) is w1 ⊗ w2."""
        (P1, Q1), (P2, Q2) = _split(self.w1), _split(self.w2)
        return Factors(torch.kron(Q1, Q2), torch.kron(P1, P2), self.s)

    def bound(self) -> int:
        return min(self.w1.shape) * min(self.w2.shape)


def _split(w: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = w.shape
    one = torch.eye(min(rows, cols), dtype=w.dtype, device=w.device)
    return (one, w) if rows <= cols else (w, one)


@dataclass(frozen=True)
class KroneckerSpec(DeltaSpec):
    """The wanted shape of w1, the scale, input dropout."""

    factor_out: int
    factor_in: int
    scaling: float
    dropout: float = 0.0

    def __post_init__(self) -> None:
        random.check_dropout(self.dropout)
        for name, factor in (("factor_out", self.factor_out), ("factor_in", self.factor_in)):
            if factor < 1 and factor != -1:
                raise BadParameter(f"{name}={factor} is not possible; use a positive number, or -1 for the divisor next to the square root")

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"kronecker"})

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Kronecker:
        return Kronecker(site, self, dtype=dtype, device=device)

    def shapes(self, site: Site) -> Shapes:
        """(a₁, a₂), (b₁, b₂). Raises BadParameter where nothing would be saved."""
        a1, a2 = divisor(site.d_out, self.factor_out), divisor(site.d_in, self.factor_in)
        if a1 * a2 == 1:
            raise BadParameter(
                f"at site {site.name!r} ({site.d_out} × {site.d_in}) w1 would be 1 × 1 and w2 as large as W; "
                "use a factor_out or factor_in that divides its side, or leave the site out"
            )
        return (a1, a2), (site.d_out // a1, site.d_in // a2)

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            self.shapes(site)

    def count(self, site: Site) -> int:
        return sum(math.prod(shape) for shape in self.shapes(site))


def divisor(d: int, factor: int) -> int:
    """`factor` where it divides d, else the largest divisor of d that exceeds neither it nor √d; -1 is no limit but √d."""
    if factor > 0 and d % factor == 0:
        return factor
    most = math.isqrt(d) if factor < 0 else min(factor, math.isqrt(d))
    return max(k for k in range(1, most + 1) if d % k == 0)


@dataclass(frozen=True)
class FirstZero:
    """w1 = 0, w2 ~ U(±1/√b₂); at an embedding, where nothing is summed over the inputs, w2 ~ N(0, 1)."""

    requires: frozenset[str] = frozenset({"kronecker"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Kronecker)
        bound = 1 / math.sqrt(delta.w2.shape[1])
        drawn = (
            normal(delta.w2, 1.0, rng) if site.kind == "embedding" else torch.empty(delta.w2.shape).uniform_(-bound, bound, generator=rng)
        )
        set_(delta.w2, drawn)


@method("krona", paper="arXiv:2212.10650", survey="2.1", kind="delta")
def krona(
    dropout: float = 0.0,
    sites: Where = "all-linear",
    factor_out: int = -1,
    factor_in: int = -1,
    scaling: float = 1.0,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """The update as a Kronecker product w1 ⊗ w2: of full rank with few parameters."""
    return Method(KroneckerSpec(factor_out, factor_in, scaling, dropout), FirstZero(), sites=sites, unfreeze=unfreeze)
