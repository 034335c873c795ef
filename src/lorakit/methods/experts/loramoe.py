"""LoRAMoE: N LoRA experts at every site under a dense router of its own; a constraint gives each kind of sample its own half of them.

    y = W x + s Σ_i g_i(x) B_i A_i x        g = softmax(R x) in fp32        A: N × r × d_in, B: N × d_out × r, R: N × d_in
    Q_bi = mean of g_i over sample b's tokens        I_bi = 1 + δ where expert i is of sample b's kind, else 1 − δ
    loss = CE + β Σ_sites var(Z) / (mean(Z)² + 1e-10)        Z = I ∘ Q over all samples and experts of a micro-batch, var unbiased

A_i as in LoRA, each with draws of its own, B_i = 0, R ~ U(±1/√d_in); the router reads x before the dropout.
Trained: A, B, R. N = 1 is LoRA, bit for bit. Never merged: the gates depend on the input. One expert is taken out as a LoRA by
`lorakit.adapters.expert.expert(adapter, i)`.
`experts` N. `balance` β: 0 leaves the constraint out, as the official script does. With it every row of the data needs an integer `kind`
in 0 … `kinds` − 1: the experts are cut into `kinds` equal groups, the first for the highest kind (the paper's type 1), the last for kind 0.
`delta` δ. Padding counts for nothing; under packing a sample is a document.
`target`: the constraint makes Q small where I is large, so "published" (the paper's and the code's I) leaves a sample the *smaller* share,
(1 − δ)/(1 + δ), in its own kind's group. "intended" has the signs of δ turned, so that the matching group gets the larger share.
The code sums Q over tokens; a mean is the same where samples are equally long, as the ratio has no scale, and does not measure length
elsewhere.
Defaults: r 4, alpha 32, dropout 0.05, N 8, β 0 (official script); δ 0.1 (the paper has N 6, δ = β = 0.1: our reading, from memory). The
script adapts the feed-forward alone, so `sites` is mlp.
References: arXiv:2312.09979, section 4; code Ablustrund/LoRAMoE; survey 4.3.

Use it when one adapter has to serve several kinds of samples that disturb each other, and rows say their kind (`balance` > 0), or you hope
the router finds them. It is never merged, so every forward pays for all experts; the paper's constraint as printed rewards the wrong group
(see `target`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.attach import Adapted
from lorakit.core.context import Ctx
from lorakit.core.errors import BadParameter, DataError, Incompatible
from lorakit.core.events import Scored
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.ops import reference as ops
from lorakit.parts.deltas.experts import Experts, ExpertsSpec, Form
from lorakit.parts.inits.experts import FreshExperts
from lorakit.parts.routers.softmax import dense

Target = Literal["published", "intended"]
SIGNS: Mapping[Target, int] = {"published": 1, "intended": -1}


class Routed(Experts):
    """A site's experts and its router R [N, d_in]. While `watched`, the last forward's gates are `seen`."""

    watched = False
    seen: Tensor | None = None

    def __init__(self, site: Site, form: Form, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site, form, dtype=dtype, device=device)
        self.trains = self.trains | {"R"}
        self.R = nn.Parameter(torch.zeros(form.experts, site.d_in, dtype=dtype, device=device))

    def gates(self, x: Tensor, ctx: Ctx) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, self.R.dtype)) if x.is_floating_point() else x
        g = dense(ops.project(wide, self.R))
        if self.watched:  # not in a recomputation, which comes after the objective has read them
            self.seen = g
        return g


@dataclass(frozen=True)
class RoutedSpec(ExpertsSpec):
    """Experts under a router each site."""

    form: Form

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Routed:
        return Routed(site, self.form, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.form.rank.check(sites)

    def count(self, site: Site) -> int:
        return self.form.count(site) + self.form.experts * site.d_in


def dispersion(z: Tensor) -> Tensor:
    """var(z) / (mean(z)² + 1e-10) over all entries, var unbiased; 0 for a single entry."""
    return z.var() / (z.mean().square() + 1e-10) if z.numel() > 1 else z.sum() * 0.0


def shares(g: Tensor, sample: Tensor) -> Tensor:
    """Q: each sample's mean gates [S, N] of tokens [n, N] with their samples' numbers [n], 0 … S − 1."""
    sums = g.new_zeros(int(sample.max()) + 1, g.shape[-1]).index_add(0, sample, g)
    return sums / sample.bincount()[:, None]


@dataclass(frozen=True)
class Localized:
    """The task's loss and β times the dispersion of I ∘ Q at every router."""

    balance: float
    delta: float
    groups: int
    target: Target
    requires: frozenset[str] = Experts.provides

    def __call__(self, score: Callable[[int], Scored], adapted: Adapted) -> tuple[Tensor, int]:
        routed = [b.delta for b in adapted.branches() if isinstance(b.delta, Routed)]
        for delta in routed:
            delta.watched = True
        try:
            done, ctx = score(0), adapted.context
            found = [(d.site.name, d.seen) for d in routed if d.seen is not None]
        finally:
            for delta in routed:
                delta.watched, delta.seen = False, None
        return done.loss + self.balance * done.n * self.constraint(found, ctx), done.n

    def constraint(self, found: Sequence[tuple[str, Tensor]], ctx: Ctx) -> Tensor:
        """Summed over the routers, whose gates are [.., N] each."""
        if ctx.kinds is None or ctx.samples is None:
            raise DataError("balance > 0 needs to know each sample's kind: give every row an integer 'kind', or set balance=0")
        real = ctx.kinds.flatten() >= 0
        for name, g in found:
            if g.shape[:-1].numel() != len(real):
                raise Incompatible(f"site {name!r} does not see every token, so its gates have no samples; leave it out of sites")
        _, sample = ctx.samples.flatten()[real].unique(return_inverse=True)
        kind = ctx.kinds.new_zeros(int(sample.max()) + 1).scatter(0, sample, ctx.kinds.flatten()[real])
        weights = self.weights(kind, found[0][1].shape[-1])
        return torch.stack([dispersion(weights.to(g) * shares(g.flatten(0, -2)[real], sample)) for _, g in found]).sum()

    def weights(self, kind: Tensor, n: int) -> Tensor:
        """I: samples' kinds [S] -> [S, n]."""
        if int(kind.max()) >= self.groups:
            raise DataError(f"a row has the kind {int(kind.max())}; with kinds={self.groups} expected 0 to {self.groups - 1}")
        group = self.groups - 1 - torch.arange(n, device=kind.device) * self.groups // n
        return 1 + SIGNS[self.target] * self.delta * (2.0 * (group == kind[:, None]) - 1)


@method("loramoe", paper="arXiv:2312.09979", survey="4.3", kind="router")
def loramoe(
    r: int = 4,
    alpha: float = 32.0,
    experts: int = 8,
    balance: float = 0.0,
    delta: float = 0.1,
    kinds: int = 2,
    target: Target = "published",
    dropout: float = 0.05,
    sites: Where = "mlp",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA experts under a dense router at every site, on request with the localized balancing constraint."""
    if balance < 0 or not 0 <= delta < 1:
        raise BadParameter(f"balance={balance}, delta={delta}: expected balance >= 0 and 0 <= delta < 1")
    if balance and (kinds < 1 or experts % kinds):
        raise BadParameter(f"experts={experts} cannot be cut into kinds={kinds} equal groups; make one a multiple of the other")
    form = Form(experts, Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern), dropout)
    constraint = Localized(balance, delta, kinds, target) if balance else None
    return Method(RoutedSpec(form), FreshExperts(router=True), sites=sites, unfreeze=unfreeze, objective=constraint)
