"""DyLoRA: one adapter that is good at every rank of a range.

    y = W x + s_b · B[:, :b] A[:b] x + bias        b drawn for every step from {r_min, …, r}, s_b = alpha / b

Whatever b a step draws, the first components must do without the later ones, so they become ordered by importance and the adapter may be
cut at any b afterwards: `eval_r` is the b of evaluation, merging and export (None: r), and `truncated(adapter, b)` gives a saved adapter
another. All r components stay in the checkpoint.
A step updates the components 1 to b, or with `frozen` component b alone (the paper's faster form). The others keep their bits, and their
optimizer state too: momentum and weight decay would move what was not drawn. b is one for all sites, a pure function of (seed, step);
its `distribution` is uniform, or geometric with P(b) ∝ (1 − p)^(b − r_min), or as `weights`, one a rank, say. Training masks the rows
outside b, so that no shape changes and a compiled model is compiled once.
With `scale` "r" the scale is alpha / r at every b. At alpha / b, the paper's, cutting also rescales what stays, so one pair's cuts cannot
all be the best of their rank: for ΔW* = diag(σ₁, …) component 1 would have to be b σ₁ / alpha at every b at once. Under "r" they can.
Trained: A and B, r (d_in + d_out) a site; shapes, init and export as in `lora`.
Defaults: r 8, r_min 1, alpha 16, uniform, not frozen; all of them, and p 0.15, from memory.
References: arXiv:2210.07558; survey 3.2.3, whose "only the b-th row" is the frozen form.

Use it when one training run must serve devices of different size: any cut of the adapter is a usable adapter. Not when you know the rank: a
`lora` of that rank trains all of it in every step, and under the paper's scale alpha / b no single pair has every cut the best of its rank
(`scale` "r" does, the log says).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.adapter import Adapter
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors, Product
from lorakit.core.errors import BadParameter
from lorakit.core.events import Controller, Run, Step
from lorakit.core.method import Method, Recipe, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import Kaiming
from lorakit.parts.optimizers.partial import Partial

STREAM = int(random.stream("dylora"))


class Nested(Delta):
    """One site's A [r, d_in] and B [d_out, r]; `drawn` and `kept` [r] are s_b on the first b components, 0 on the others."""

    provides = frozenset({"factors", "nested"})
    trains = frozenset({"A", "B"})
    drawn: Tensor
    kept: Tensor

    def __init__(self, site: Site, spec: "NestedSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec, self.p, self.stream = spec, spec.dropout, random.stream(site.name)
        self.draws = spec.dropout > 0
        self.A = nn.Parameter(torch.zeros(spec.r, site.d_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(site.d_out, spec.r, dtype=dtype, device=device))
        for name, b in (("drawn", spec.r), ("kept", spec.eval_r)):
            self.register_buffer(name, self.gate(b), persistent=False)

    def gate(self, b: int) -> Tensor:
        """s_b on the first b components, 0 on the others."""
        gate = self.A.new_zeros(self.spec.r)
        gate[:b] = self.spec.scale_at(b)
        return gate.detach()

    def product(self, ctx: Ctx) -> Product:
        return Product(self.A, self.B, g=self.drawn if self.training else self.kept)

    def weight(self) -> Tensor:
        return self.B @ (self.kept[:, None] * self.A)

    def factors(self) -> Factors:
        b = self.spec.eval_r
        return Factors(self.A[:b], self.B[:, :b], self.spec.scale_at(b))

    def bound(self) -> int:
        return self.spec.r


@dataclass(frozen=True)
class NestedSpec(DeltaSpec):
    """The largest rank, the rank kept in evaluation, alpha and what it is divided by."""

    r: int
    eval_r: int
    alpha: float
    scale: Literal["b", "r"]
    dropout: float

    def __post_init__(self) -> None:
        random.check_dropout(self.dropout)

    @property
    def provides(self) -> frozenset[str]:
        return Nested.provides

    def scale_at(self, b: int) -> float:
        """s_b."""
        return self.alpha / (b if self.scale == "b" else self.r)

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Nested:
        return Nested(site, self, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        Rank.of(self.r, self.alpha).check(sites)

    def count(self, site: Site) -> int:
        return self.r * (site.d_in + site.d_out)


@dataclass(frozen=True)
class DrawSpec:
    """The weight of every b, the first of them, and whether a step updates component b alone."""

    r_min: int
    weights: tuple[float, ...]
    frozen: bool
    requires: frozenset[str] = frozenset({"nested"})

    def build(self, run: Run) -> "Draw":
        return Draw(self, run)

    def rank(self, seed: int, step: int) -> int:
        """b of a step: where a number that (seed, step) determine falls among the weights."""
        share = random.mixed(seed, step, STREAM) / 2**63 * sum(self.weights)
        return self.r_min + sum(share >= upper for upper in list(accumulate(self.weights))[:-1])


class Draw(Controller):
    """Sets every site's b before a step, and keeps the step off what was not drawn."""

    def __init__(self, spec: DrawSpec, run: Run) -> None:
        self.spec, self.run, self.partial = spec, run, Partial()
        self.deltas = [b.delta for b in run.adapted.branches() if isinstance(b.delta, Nested)]

    def before_forward(self, step: Step) -> None:
        b = self.spec.rank(self.run.adapted.seed, step.index)
        for delta in self.deltas:
            delta.drawn.copy_(delta.gate(b))

    def after_backward(self, step: Step) -> None:
        b = self.spec.rank(self.run.adapted.seed, step.index)
        for delta in self.deltas:
            number = torch.arange(1, len(delta.A) + 1, device=delta.A.device)
            moved = number == b if self.spec.frozen else number <= b
            self.partial.before(self.run.optimizer, [(delta.A, moved[:, None]), (delta.B, moved)])

    def after_step(self, step: Step) -> None:
        self.partial.after()


def truncated(adapter: Adapter, b: int) -> Adapter:
    """A finished DyLoRA cut at rank b; the tensors stay, so that it can be cut anew."""
    return replace(adapter, recipe=Recipe(adapter.recipe.name, {**adapter.recipe.kwargs, "eval_r": b}))


@method("dylora", paper="arXiv:2210.07558", survey="3.2.3", kind="controller")
def dylora(
    r: int = 8,
    r_min: int = 1,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    eval_r: int | None = None,
    frozen: bool = False,
    distribution: Literal["uniform", "geometric"] = "uniform",
    p: float = 0.15,
    weights: tuple[float, ...] = (),
    scale: Literal["b", "r"] = "b",
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA trained at a rank drawn for every step, so that it can be cut at any rank afterwards."""
    kept = r if eval_r is None else eval_r
    if not 1 <= r_min <= kept <= r or not 0 < p < 1:
        raise BadParameter(f"r_min={r_min}, eval_r={kept} and r={r} must not fall, r_min be at least 1, and p={p} lie between 0 and 1")
    n = r - r_min + 1
    chances = {"uniform": (1.0,) * n, "geometric": tuple((1 - p) ** i for i in range(n))}
    chosen = weights or chances[distribution]
    if len(chosen) != n or min(chosen) < 0 or sum(chosen) <= 0:
        raise BadParameter(f"weights={weights} must be {n} numbers, one for each rank from {r_min} to {r}, not negative and not all 0")
    spec = NestedSpec(r, kept, alpha, scale, dropout)
    return Method(spec, Kaiming(), sites=sites, unfreeze=unfreeze, controllers=(DrawSpec(r_min, chosen, frozen),))
