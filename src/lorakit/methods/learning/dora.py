"""DoRA: weight-decomposed low-rank adaptation.

    W' = m ∘ (W + s·BA) / ‖W + s·BA‖        m: d_out, starts at ‖W‖; the norm is by output rows (dim 1 of the torch weight)
    y  = W x + bias + (m/n − 1) ∘ W x̃ + (m/n) ∘ s·BA x̃        n = ‖W + s·BA‖, x̃ = dropout(x)

Trained: m, A and B, r (d_in + d_out) + d_out a site. m starts at the computed n, so the output at the start is the base's, bit for bit.
n comes from W Aᵀ and A Aᵀ, never from a dense W + s·BA, and is a constant in backward (section 4.3) unless `detach_norm` is off.
The paper says "column-wise" of a W stored d_in × d_out; these are rows here. Not exactly representable as plain LoRA.
Defaults: as `lora`; the paper's README has r 32, alpha 64, and finds half of LoRA's rank enough.
References: arXiv:2402.09353; survey 3.3.2.

Use it when LoRA at the same rank falls short of full fine-tuning and merging before serving is fine: a trained norm for every output row
costs d_out parameters. A step takes about 1.25 times LoRA's (1.19 uncompiled), and only its merged weights, not plain factors, represent it
exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.base import Base
from lorakit.core.combine import Combine
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta
from lorakit.core.method import Method, method
from lorakit.core.site import Site, Where
from lorakit.methods.lora.lora import lora
from lorakit.ops import reference as ops


class Decomposed(Combine):
    """Magnitude m [d_out] trained, direction W + s·BA."""

    trains = frozenset({"m"})
    fuses = rescales = True
    w2: Tensor

    def __init__(self, base: Base, delta: Delta, detach_norm: bool) -> None:
        super().__init__()
        self.detach_norm = detach_norm
        W = base.dense()
        wide = torch.promote_types(W.dtype, torch.float32)
        self.register_buffer("w2", W.to(wide).square().sum(1), persistent=False)
        self.m = nn.Parameter(torch.zeros(base.shape[0], dtype=wide, device=base.device))

    def norm(self, base: Base, delta: Delta) -> Tensor:
        """n [d_out], at least in fp32."""
        f = delta.factors()
        assert f is not None
        wide = self.w2.dtype
        A = f.A.to(wide)
        WA = base.matmul(f.A.to(base.dtype)).T.to(wide)  # a narrow W is not copied: what rounds is the cross term alone
        return ops.row_norm(self.w2, WA, A, f.B.to(wide), f.s)

    def gain(self, base: Base, delta: Delta) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            n = self.norm(base, delta)
        return self.m / n.clamp_min(torch.finfo(n.dtype).tiny)

    def forward(self, x: Tensor, y: Tensor, base: Base, delta: Delta, ctx: Ctx) -> Tensor:
        dropped = delta.drop(x, ctx)
        gain = self.gain(base, delta)
        if dropped is not x:
            frozen = base.matmul(dropped)
        else:
            frozen = y if base.bias is None else y - base.bias
        return (gain - 1).to(y.dtype) * frozen + gain.to(y.dtype) * delta(dropped, ctx)  # type: ignore[no-any-return]

    def weight(self, base: Base, delta: Delta) -> Tensor:
        gain = self.gain(base, delta)[:, None]
        W = base.dense(gain.dtype)
        return (gain - 1) * W + gain * delta.weight().to(gain.dtype)


@dataclass(frozen=True)
class DecomposedSpec:
    """Builds a site's decomposition; m starts at the current norm."""

    detach_norm: bool = True
    requires: frozenset[str] = frozenset({"factors"})

    def build(self, site: Site, base: Base, delta: Delta) -> Decomposed:
        combine = Decomposed(base, delta, self.detach_norm)
        with torch.no_grad():
            combine.m.copy_(combine.norm(base, delta))
        return combine

    def count(self, site: Site) -> int:
        return site.d_out

    def full_rank(self) -> bool:
        return True


@method("dora", paper="arXiv:2402.09353", survey="3.3.2", kind="combine")
def dora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    detach_norm: bool = True,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA on the direction of W, with the magnitude of each output row trained apart."""
    method = lora(r, alpha, dropout, sites, rank_pattern, alpha_pattern, unfreeze)
    return method.but(combine=DecomposedSpec(detach_norm))
