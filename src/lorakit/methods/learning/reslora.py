"""ResLoRA: residual paths from earlier layers' low-rank modules to later ones.

Sites of one kind in consecutive layers form a chain; n − i is the i-th predecessor of n, of which there are at most `pre`.

    is   y_n = W_n x_n + s B_n A_n (x_n + x_{n−1})                    input shortcut, one predecessor
    bs   y_n = W_n x_n + s Σ_{i=0..pre} B_{n−i} A_{n−i} x_n           block shortcut
    ms   y_n = W_n x_n + s B_n (A_n x_n + Σ_{i=1..pre} A_{n−i} x_{n−i})   middle shortcut

The first layer has no predecessor and is plain LoRA (the official code doubles its input). Trained: A and B, r (d_in + d_out) a site; with
`bs` and `ms` they are trained through later layers too. A as in `lora`, B = 0.
`bs` is a change of the weight, of rank (pre + 1) r, and merges and exports exactly. `is` and `ms` read other layers' inputs and cannot.
`approximate` gives the nearest plain LoRA by the paper's rule x_{n−i} ≈ α_i x_n, α_i the ratio of the inputs' norms over a calibration
set ("bi") or of the weights' norms ("bw"), and is labeled so.
Defaults: `variant` ms, r 4, alpha 16, `pre` 4 (official; -1 means all). In decoding with a cache a predecessor's input is the same token's.
References: arXiv:2402.18039; survey 3.3.2.

Use it when a deep model trains slowly with LoRA and you may spend on longer paths for the gradient; choose `variant` bs if the result must
merge exactly. `is` and `ms` cannot be merged but by an approximation that is labeled so, and serving them needs this library.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.adapter import Adapter
from lorakit.core.attach import Adapted
from lorakit.core.calibrate import INPUTS, Calibration, observe
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors
from lorakit.core.errors import BadParameter
from lorakit.core.method import Method, Recipe, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.ops import reference as ops
from lorakit.parts.inits.random import Kaiming

Variant = Literal["is", "bs", "ms"]


class Links(Shared):
    """Who precedes whom, and the deltas by site name. It owns no tensor."""

    def __init__(self, sites: Sequence[Site], pre: int) -> None:
        super().__init__()
        self.before: dict[str, list[Site]] = {}
        self.deltas: dict[str, Residual] = {}
        chains: dict[Any, list[Site]] = {}
        for site in sites:
            chain = chains.setdefault((re.sub(r"\d+", "#", site.name, count=1), site.d_in, site.d_out), [])
            self.before[site.name] = chain[::-1][: pre if pre >= 0 else None] if site.layer is not None else []
            chain.append(site)


class Residual(Delta):
    """One site's A [r, d_in] and B [d_out, r], and the way to its predecessors'."""

    provides = frozenset({"factors"})
    trains = frozenset({"A", "B"})

    def __init__(self, site: Site, spec: "ResidualSpec", links: Links, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.r, self.s = spec.rank.at(site)
        self.variant, self.linear, self.links, self.site = spec.variant, spec.linear, (links,), site
        self.p, self.stream, self.draws = spec.dropout, random.stream(site.name), spec.dropout > 0
        self.A = nn.Parameter(torch.zeros(self.r, site.d_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(site.d_out, self.r, dtype=dtype, device=device))
        self.reads = () if spec.linear else tuple(dict.fromkeys(s.module for s in links.before[site.name]))
        links.deltas[site.name] = self

    @property
    def chain(self) -> list["Residual"]:
        """The predecessors' deltas, nearest first."""
        (links,) = self.links
        return [links.deltas[s.name] for s in links.before[self.site.name]]

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        A, B = (self._down(), self._up()) if self.linear else (self.A, self.B)
        dtype = x.dtype if x.is_floating_point() else B.dtype
        if self.variant == "is":
            x = sum((self.drop(ctx.memo[path], ctx) for path in self.reads), x)
        z = ops.project(x, A.to(dtype))
        if self.variant == "ms":
            for delta in self.chain:
                z = z + ops.project(delta.drop(ctx.memo[delta.site.module], ctx), delta.A.to(dtype))
        return ops.expand(z, B.to(dtype), self.s)

    def weight(self) -> Tensor:
        return self.s * (self._up() @ self._down()) if self.linear else super().weight()

    def factors(self) -> Factors | None:
        return Factors(self._down(), self._up(), self.s) if self.linear else None

    def bound(self) -> int:
        return self.r + sum(delta.r for delta in self.chain) if self.linear else super().bound()

    def _down(self) -> Tensor:
        return torch.cat([self.A, *(d.A for d in self.chain)])

    def _up(self) -> Tensor:
        return torch.cat([self.B, *(d.B for d in self.chain)], dim=1)


@dataclass(frozen=True)
class ResidualSpec(DeltaSpec):
    """Rank and scale, dropout, the shortcut and how many predecessors it has."""

    rank: Rank
    dropout: float
    variant: Variant
    pre: int
    provides = Residual.provides

    def __post_init__(self) -> None:
        if self.pre < -1 or self.pre == 0:
            raise BadParameter(f"pre={self.pre} is not possible; expected -1 (all predecessors) or at least 1")
        if not 0 <= self.dropout < 1:
            raise BadParameter(f"dropout={self.dropout} is not a probability; expected 0 <= dropout < 1")

    @property
    def linear(self) -> bool:
        return self.variant == "bs"

    def pool(
        self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Links:
        return Links(sites, 1 if self.variant == "is" else self.pre)

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Residual:
        assert isinstance(pool, Links)
        return Residual(site, self, pool, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.rank.check(sites)
        before = Links(sites, self.pre).before if self.variant == "ms" else {}
        for site in sites:
            r, others = self.rank.at(site)[0], {s.name: self.rank.at(s)[0] for s in before.get(site.name, ())}
            odd = [f"{name} of rank {other}" for name, other in others.items() if other != r]
            if odd:
                raise BadParameter(
                    f"{site.name} of rank {r} cannot add what {odd[0]} sends it; variant='ms' needs one rank for sites of one kind"
                )

    def count(self, site: Site) -> int:
        return self.rank.at(site)[0] * (site.d_in + site.d_out)


def approximate(adapted: Adapted, data: Calibration, how: Literal["bi", "bw"] = "bi") -> tuple[Adapter, dict[str, list[float]]]:
    """The nearest plain LoRA of an `is` or `ms` adapter, and the ratios α by site: an approximation, which merges and exports."""
    branches = {b.site.name: b for b in adapted.branches()}
    with adapted.disabled():
        seen = observe(adapted.model, [b.site for b in branches.values()], frozenset({INPUTS}), data)
    inputs = {n: s.moment.diagonal().sum().sqrt() for n, s in seen.items() if s.moment is not None}
    norm = inputs if how == "bi" else {n: b.base.dense().float().norm() for n, b in branches.items()}
    tensors: dict[str, Tensor] = {}
    ratios: dict[str, list[float]] = {}
    for name, branch in branches.items():
        delta = branch.delta
        assert isinstance(delta, Residual)
        ratios[name] = [float(norm[d.site.name] / norm[name]) for d in delta.chain]
        near = (
            delta.A * sum(ratios[name]) if delta.variant == "is" else sum(a * d.A for a, d in zip(ratios[name], delta.chain, strict=True))
        )
        tensors |= {f"{name}.A": (delta.A + near).detach().cpu(), f"{name}.B": delta.B.detach().cpu()}
    (active,) = adapted.active
    recipe = adapted.state(active).recipe
    kept = {k: v for k, v in recipe.kwargs.items() if k in ("r", "alpha", "sites", "rank_pattern", "alpha_pattern")}
    meta = {"base": adapted.fingerprint.as_dict(), "approximates": f"{recipe.name} ({how})"}
    return Adapter(Recipe("lora", {"r": 4, "alpha": 16.0} | kept), tuple(b.site for b in branches.values()), tensors, meta), ratios


@method("reslora", paper="arXiv:2402.18039", survey="3.3.2", kind="delta")
def reslora(
    r: int = 4,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    variant: Variant = "ms",
    pre: int = 4,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA with shortcuts from the low-rank modules of earlier layers."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    return Method(ResidualSpec(rank, dropout, variant, pre), Kaiming(), sites=sites, unfreeze=unfreeze)
