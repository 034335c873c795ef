"""LoRA-XS: a small trained core between frozen singular vectors of W.

    W ≈ U Σ Vᵀ        y = W x + s · B R A dropout(x) + bias        ΔW = s · B R A
    A: r × d_in and B: d_out × r_out hold the largest singular vectors of W and are frozen, R: r_out × r is trained; s = alpha / r

The core's size does not depend on the width of the model. ΔW keeps to the r_out left and r right singular directions it began with; what
lies outside them is never learned. `r_out` None is r, the square core of the paper.
`sigma`: where the singular values go. A: on A, as in the official code, the default; B: on B, as the paper writes it; split: √Σ on each.
The functions are the same, R's gradient is scaled by columns, rows or both.
`niter` 0 is the exact SVD in fp32; above, that many randomized subspace iterations. Singular vectors are unique up to sign at best, and
R means nothing without its A and B: all three are saved. As plain LoRA: A, and B R.
Trained: R, r_out · r values a site. R ~ N(0, `std`²), so ΔW is almost zero at the start; std 0 makes it zero, and R learns all the same.
Defaults: std 1e-5 and alpha = r, so s = 1 (the official scripts, which have r from 4 to 64).
References: arXiv:2405.17604; survey 5.1.1. That the paper puts Σ on B is from memory.

Use it when the number of values for each adapter must be tiny and not depend on the model's width: r² a site, for thousands of tenants. It
learns inside W's principal directions alone, and wants rates of some ten times LoRA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors, Product
from lorakit.core.errors import BadParameter
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import normal, set_
from lorakit.parts.inits.triplets import principal, signed

Side = Literal["A", "B", "split"]
POWERS: dict[Side, tuple[float, float]] = {"A": (0.0, 1.0), "B": (1.0, 0.0), "split": (0.5, 0.5)}
"""The powers of Σ on B and on A."""


class Cored(Delta):
    """One site's frozen A [r, d_in] and B [d_out, r_out], and the core R [r_out, r]."""

    trains = frozenset({"R"})
    A: Tensor
    B: Tensor

    def __init__(self, site: Site, spec: "CoredSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        (r_out, r), self.s = spec.core(site), spec.rank.at(site)[1]
        self.p, self.stream, self.draws = spec.dropout, random.stream(site.name), spec.dropout > 0
        self.provides = spec.provides
        self.register_buffer("A", torch.zeros(r, site.d_in, dtype=dtype, device=device))
        self.register_buffer("B", torch.zeros(site.d_out, r_out, dtype=dtype, device=device))
        self.R = nn.Parameter(torch.zeros(r_out, r, dtype=dtype, device=device))

    def product(self, ctx: Ctx) -> Product:
        return Product(self.A, self.B @ self.R, self.s)

    def weight(self) -> Tensor:
        return self.s * (self.B @ (self.R @ self.A))

    def factors(self) -> Factors:
        return Factors(self.A, self.B @ self.R, self.s)

    def bound(self) -> int:
        return min(self.R.shape)


@dataclass(frozen=True)
class CoredSpec(DeltaSpec):
    """The core's columns and scale, its rows (None: as many), input dropout."""

    rank: Rank
    r_out: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        random.check_dropout(self.dropout)

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"factors", "core"})

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Cored:
        return Cored(site, self, dtype=dtype, device=device)

    def core(self, site: Site) -> tuple[int, int]:
        """(rows, columns) of R at a site. Raises BadParameter when W has fewer singular vectors."""
        r, most = self.rank.at(site)[0], min(site.d_in, site.d_out)
        r_out = r if self.r_out is None else self.r_out
        if not 1 <= r_out <= most:
            raise BadParameter(f"r_out={r_out} is not possible at site {site.name!r} ({site.d_out} × {site.d_in}); use 1 to {most}")
        return r_out, r

    def check(self, sites: Sequence[Site]) -> None:
        self.rank.check(sites)
        for site in sites:
            self.core(site)

    def count(self, site: Site) -> int:
        r_out, r = self.core(site)
        return r_out * r


@dataclass(frozen=True)
class SingularFrames:
    """A and B from the largest singular triplets of W, and a core close to zero."""

    sigma: Side = "A"
    std: float = 1e-5
    niter: int = 0
    requires: frozenset[str] = frozenset({"core"})

    def __post_init__(self) -> None:
        if self.std < 0 or self.niter < 0:
            raise BadParameter(f"std={self.std} and niter={self.niter} must not be negative; the official code has std 1e-5")

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Cored)
        r_out, r = delta.R.shape
        U, S, Vh = signed(*principal(base.dense().cpu(), max(r_out, r), self.niter, rng))
        left, right = POWERS[self.sigma]
        set_(delta.B, U[:, :r_out] * S[:r_out] ** left)
        set_(delta.A, S[:r, None] ** right * Vh[:r])
        set_(delta.R, normal(delta.R, self.std, rng))


@method("lora_xs", paper="arXiv:2405.17604", survey="5.1.1", kind="frozen factors")
def lora_xs(
    r: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    r_out: int | None = None,
    sigma: Side = "A",
    std: float = 1e-5,
    niter: int = 0,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """Only an r × r core is trained, between frozen singular vectors of W."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    init = SingularFrames(sigma, std, niter)
    return Method(CoredSpec(rank, r_out, dropout), init, sites=sites, unfreeze=unfreeze, identity=std == 0)
