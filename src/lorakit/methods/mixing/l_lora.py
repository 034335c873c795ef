"""L-LoRA: every adapted module linearized in its own parameters, so that the adapters of several tasks can be added.

    f(A, B) = W x + s · (B A − B₀ A₀) dropout(x) + bias        A: r × d_in, B: d_out × r, φ = (A, B), φ₀ = (A₀, B₀)
    y = f(φ₀) + ∂f(φ₀) (φ − φ₀) = W x + s · (dB A₀ + B₀ dA) dropout(x) + bias        dA = A − A₀, dB = B − B₀

The network around the modules stays nonlinear. The expansion of a product has a closed form, so there is no forward-mode pass (the official
code's jvp computes every module twice). ΔW is linear in what was learned: among adapters of one start a weighted sum of the parameters is
that of the ΔW, whatever the weights, and of no larger rank. Plain LoRA has cross terms B_i A_j there.
`start` says where the modules are expanded:
    zero        B₀ = 0, LoRA's own. Then ∂f/∂A = 0: L-LoRA is LoRA-FA, ΔW = s B A₀ with A frozen at A₀
    random      A₀ as in zero, B₀ ~ U(±1/√r) (PEFT's `init_lora_weights=False`): ΔW = s [dB, B₀] [A₀; dA], of rank 2r
    principal   B₀ = U_r √(S_r / s), A₀ = √(S_r / s) V_rᵀ of W = U S Vᵀ, as PiSSA, by an exact SVD: of rank 2r, too
The start's own s·B₀A₀ is subtracted, as in PiSSA, so the output is the base's at first. Trained are dA and dB, from zero, not A and B:
weight decay shrinks ΔW and moves nothing else. PEFT's orthogonal start, B₀A₀ = 0 by halves, is `random` of half the rank once linearized,
and not offered.
`start_seed`: A₀ and B₀ follow from it and the site's name, whatever the run's seed. Tasks that are to be added must have it in common, and
the start; the adapter holds A₀ and B₀ all the same. At an embedding A₀ ~ N(0, 1).
With `dora` the start zero trains, but is no longer linear in B; the others refuse it.
Trained: at zero B, r d_out values a site; at the others dA and dB, r (d_in + d_out). Checkpoint: a plain LoRA pair (A₀, B) at zero; the
others are plain LoRA of rank 2r.
Defaults: r 16, alpha 32, dropout 0.1, q and v, seed 42, start zero (official code, flan-t5-base). random and principal are ours.
References: arXiv:2310.04742; survey 4.2.

Use it when adapters of several tasks will be added up later: their sums have no cross terms and no growing rank. For a single task it is a
weaker LoRA, as nothing but a linearization is trained; all tasks must share `start` and `start_seed`.
"""

import math
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
from lorakit.core.events import Init
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import MODULES, Kind, Site, Where
from lorakit.parts.inits.random import Kaiming, normal, set_
from lorakit.parts.inits.triplets import principal, signed

Start = Literal["zero", "random", "principal"]


class Linearized(Delta):
    """One site's start A0 [r, d_in], B0 [d_out, r], frozen, and the trained changes dA, dB of their shapes."""

    provides = frozenset({"linearized"})
    trains = frozenset({"dA", "dB"})
    A0: Tensor
    B0: Tensor
    dA: nn.Parameter
    dB: nn.Parameter

    def __init__(self, site: Site, spec: "LinearizedSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        r, self.s = spec.rank.at(site)
        self.p, self.stream, self.draws = spec.dropout, random.stream(site.name), spec.dropout > 0
        for name, shape in (("A", (r, site.d_in)), ("B", (site.d_out, r))):
            self.register_buffer(f"{name}0", torch.zeros(shape, dtype=dtype, device=device))
            self.register_parameter(f"d{name}", nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))

    def product(self, ctx: Ctx) -> Product:
        f = self.factors()
        return Product(f.A, f.B, f.s)

    def weight(self) -> Tensor:
        return self.s * (self.dB @ self.A0 + self.B0 @ self.dA)

    def factors(self) -> Factors:
        return Factors(torch.cat([self.A0, self.dA]), torch.cat([self.dB, self.B0], dim=1), self.s)

    def bound(self) -> int:
        return 2 * len(self.A0)

    def roles(self) -> dict[str, str]:
        """dB is a B to LoRA+, but dA no A: what stands beside it is B0, so there is no pair to precondition one by the other."""
        return {"dA": "dA", "dB": "B"}


@dataclass(frozen=True)
class LinearizedSpec(DeltaSpec):
    """Rank and scale, input dropout."""

    rank: Rank
    dropout: float = 0.0

    def __post_init__(self) -> None:
        random.check_dropout(self.dropout)

    @property
    def provides(self) -> frozenset[str]:
        return Linearized.provides

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Linearized:
        return Linearized(site, self, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.rank.check(sites)

    def count(self, site: Site) -> int:
        return self.rank.at(site)[0] * (site.d_in + site.d_out)


@dataclass(frozen=True)
class RandomPair:
    """A₀ ~ U(±1/√d_in), at an embedding N(0, 1), and B₀ ~ U(±1/√r)."""

    requires: frozenset[str] = Linearized.provides

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Linearized)
        set_(delta.A0, normal(delta.A0, 1.0, rng) if site.kind == "embedding" else uniform(delta.A0, rng))
        set_(delta.B0, uniform(delta.B0, rng))


@dataclass(frozen=True)
class PrincipalPair:
    """A₀, B₀ from the r largest singular triplets of W."""

    requires: frozenset[str] = Linearized.provides

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Linearized)
        if delta.s <= 0:
            raise BadParameter(f"the scale at site {site.name!r} is {delta.s}; √(S / s) needs alpha > 0")
        U, S, Vh = signed(*principal(base.dense().cpu(), len(delta.A0), 0, rng))
        root = (S / delta.s).sqrt()
        set_(delta.A0, root[:, None] * Vh)
        set_(delta.B0, U * root)


@dataclass(frozen=True)
class Pinned:
    """A start that draws from a seed of its own: tasks that are trained apart, whatever their runs' seeds, share it."""

    start: Init
    seed: int

    @property
    def kinds(self) -> frozenset[Kind]:
        kinds: frozenset[Kind] = getattr(self.start, "kinds", MODULES)
        return kinds

    @property
    def requires(self) -> frozenset[str]:
        return self.start.requires

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        self.start(delta, base, site, random.generator(self.seed, site.name))


STARTS: dict[Start, Init] = {"zero": Kaiming(embedding="A"), "random": RandomPair(), "principal": PrincipalPair()}


def uniform(like: Tensor, rng: torch.Generator) -> Tensor:
    """U(±1/√n) of `like`'s shape [.., n], drawn on the CPU."""
    bound = 1 / math.sqrt(like.shape[-1])
    return torch.empty(like.shape).uniform_(-bound, bound, generator=rng)


@method("l_lora", paper="arXiv:2310.04742", survey="4.2", kind="delta")
def l_lora(
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.1,
    sites: Where = "qv",
    start: Start = "zero",
    start_seed: int = 42,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA linearized module by module at a start that all tasks share: adding adapters adds their updates."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    delta = LowRankSpec(rank, dropout, train=("B",)) if start == "zero" else LinearizedSpec(rank, dropout)
    return Method(delta, Pinned(STARTS[start], start_seed), sites=sites, unfreeze=unfreeze)
