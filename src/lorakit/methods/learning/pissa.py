"""PiSSA: principal singular values and singular vectors adaptation.

    W = U S Vᵀ        B₀ = U_r √(S_r / s)        A₀ = √(S_r / s) V_rᵀ
    y = (W − s·B₀A₀) x + s·B A dropout(x) + bias        A, B start at A₀, B₀

The adapter starts at the principal part of W, which learns faster than noise; the residual is frozen. The paper rewrites W into the
residual; here the pair (A₀, B₀) stays in the delta as a frozen anchor, so that the base is never touched: other adapters on it stay
right, disabling and detaching are exact, bf16 loses nothing, and the adapter is plain LoRA of rank 2r: [B, −B₀] · [A; A₀]. With dropout
the anchor sees the dropped input too.
Trained: A and B, r (d_in + d_out) a site. `niter` 0 is the exact SVD in fp32; above, that many randomized subspace iterations (the
paper: 4 to 16).
Defaults: alpha = r, so s = 1 (section 5: r = alpha = 128).
References: arXiv:2404.02948; survey 3.3.1.

Use it when a short run has to go far: it starts at the principal part of W, which gets large gradients from the first step. It costs an SVD
of every weight at the start, a product of width 2r in forward and 1.5 times LoRA's bytes of gradients here; its plain form on disk has rank
2r.
"""

from dataclasses import dataclass

import torch

from lorakit.core.base import Base
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import set_
from lorakit.parts.inits.triplets import principal


@dataclass(frozen=True)
class Principal:
    """A₀, B₀ from the r largest singular triplets of W; the anchor remembers them."""

    niter: int = 0
    requires: frozenset[str] = frozenset({"factors", "anchor"})

    def __post_init__(self) -> None:
        if self.niter < 0:
            raise BadParameter(f"niter={self.niter} is not possible; 0 is the exact SVD, the paper uses 4 to 16")

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, LowRank) and delta.A0 is not None and delta.B0 is not None
        if delta.s <= 0:
            raise BadParameter(f"the scale at site {site.name!r} is {delta.s}; √(S / s) needs alpha > 0")
        U, S, Vh = principal(base.dense().cpu(), delta.r, self.niter, rng)
        root = (S / delta.s).sqrt()
        for tensors, value in (((delta.A, delta.A0), root[:, None] * Vh), ((delta.B, delta.B0), U * root)):
            for tensor in tensors:
                set_(tensor, value)


@method("pissa", paper="arXiv:2404.02948", survey="3.3.1", kind="init")
def pissa(
    r: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    niter: int = 0,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA that starts at W's principal singular components."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    return Method(LowRankSpec(rank, dropout, anchor=True), Principal(niter), sites=sites, unfreeze=unfreeze)
