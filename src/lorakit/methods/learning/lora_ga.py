"""LoRA-GA: low-rank adaptation with gradient approximation.

    G = U S Vᵀ, the gradient of the loss for the whole W        c = d_out^¼ / √γ
    A₀ = c · V[:, 1..r]ᵀ        B₀ = c · U[:, r+1..2r]        y = (W − s·B₀A₀) x + s·B A dropout(x) + bias        A, B start at A₀, B₀

The first step then changes ΔW by −η s² (B₀B₀ᵀG + G A₀ᵀA₀), which is c² times G's best approximation of rank 2r: no start of rank r
imitates the first step of full fine-tuning better. The paper rewrites W into the residual; here (A₀, B₀) is an anchor in the delta, as in
`pissa`, so the base is never touched and the adapter is plain LoRA of rank 2r: [B, −B₀] · [A; A₀].
Trained: A and B, r (d_in + d_out) a site. G is the mean-loss gradient over `batches` batches of the training data, in eval mode.

`direction` says which of the 2r triplets go to A and which to B: ArB2r the first r to A, A2rBr the last r, ArBr by turns, random half of
them each; the property holds for all. `gamma` is the γ of the "stable" scale. `niter` 0 is the exact SVD; above, that many randomized
subspace iterations with 4r test vectors. `peft_compat` gives PEFT's start, A₀ = V[:, 1..r]ᵀ and B₀ = c · U S, whose B vanishes with
the gradient and whose first step is not the best one. Needs 2r ≤ min(d_in, d_out).
Defaults: ArB2r, γ 16, niter 4 and 64 batches (official code, whose batches are of 2 samples). Its `norm_clip` guards the rewritten W and
has nothing to guard here.
References: arXiv:2407.05000; beyond the survey.

Use it when the first steps count and a few batches of the real training data are at hand before them: it starts along the gradient of the
full weights. Memory peaks there, since whole gradients are needed, one layer at a time; on a base that cannot afford that take `pissa` or
`eva`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.calibrate import GRADIENTS, Seen
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.events import Calibrated
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import set_
from lorakit.parts.inits.triplets import principal, signed

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]


@dataclass(frozen=True)
class FromGradient(Calibrated):
    """A₀, B₀ from 2r singular triplets of the gradient; the anchor remembers them."""

    direction: Direction = "ArB2r"
    gamma: float = 16.0
    niter: int = 4
    batches: int = 64
    peft_compat: bool = False
    requires: frozenset[str] = frozenset({"factors", "anchor"})
    needs: frozenset[str] = frozenset({GRADIENTS})

    def __post_init__(self) -> None:
        if self.gamma <= 0 or self.niter < 0 or self.batches < 0:
            raise BadParameter(
                f"gamma={self.gamma} must be positive (the paper: 16), niter={self.niter} and batches={self.batches} at least 0"
            )

    def fit(self, seen: Mapping[str, Seen], sites: Sequence[Site]) -> "Aligned":
        return Aligned(self, {name: s.gradient for name, s in seen.items() if s.gradient is not None})


@dataclass(frozen=True)
class Aligned:
    """The init that follows from the sites' gradients."""

    spec: FromGradient
    gradients: Mapping[str, Tensor]
    requires: frozenset[str] = frozenset({"factors", "anchor"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, LowRank) and delta.A0 is not None and delta.B0 is not None
        G = self.gradients[site.name]
        if not (G.isfinite().all() and G.any()):
            found = "zero" if not G.any() else "not finite"
            raise Incompatible(
                f"the gradient at site {site.name!r} is {found}: LoRA-GA has no direction to start in; leave it out of sites"
            )
        if 2 * delta.r > min(G.shape):
            raise BadParameter(
                f"r={delta.r} needs 2r singular triplets of a {site.d_out} × {site.d_in} gradient at site {site.name!r}; "
                f"use r <= {min(G.shape) // 2}, or a rank_pattern entry for this site"
            )
        A, B = aligned(G, delta.r, self.spec, rng)
        for tensor, value in ((delta.A, A), (delta.A0, A), (delta.B, B), (delta.B0, B)):
            set_(tensor, value)


def aligned(G: Tensor, r: int, spec: FromGradient, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(A₀ [r, d_in], B₀ [d_out, r]) from G [d_out, d_in]."""
    U, S, Vh = signed(*principal(G, 2 * r, spec.niter, rng, spare=2 * r))
    a, b = _halves(spec.direction, r, rng)
    c = len(G) ** 0.25 / spec.gamma**0.5
    return (Vh[a], c * U[:, b] * S[b]) if spec.peft_compat else (c * Vh[a], c * U[:, b])


def _halves(direction: Direction, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which triplets go to A and which to B: disjoint, r each."""
    order = torch.randperm(2 * r, generator=rng) if direction == "random" else torch.arange(2 * r)
    if direction == "ArBr":
        return order[1::2], order[::2]
    return (order[r:], order[:r]) if direction == "A2rBr" else (order[:r], order[r:])


@method("lora_ga", paper="arXiv:2407.05000", survey="3.3.1", kind="init")
def lora_ga(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    direction: Direction = "ArB2r",
    gamma: float = 16.0,
    niter: int = 4,
    batches: int = 64,
    peft_compat: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA whose first step is the best of rank 2r: it starts at singular vectors of the full gradient."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    init = FromGradient(direction, gamma, niter, batches, peft_compat)
    return Method(LowRankSpec(rank, dropout, anchor=True), init, sites=sites, unfreeze=unfreeze)
