"""The bottleneck in Kronecker sums (parameterized hypercomplex multiplication), whose rule all modules share.

    A = Σ_i (R_i ⊗ S_i T_i)ᵀ        R_i: n × n shared, i = 1 … n; S_i: (d / n) × ρ, T_i: ρ × (r / n) of A's own; B likewise, r to d_out

A [r, d] and B [d_out, r] are never formed: a row vector h in blocks h_1 … h_n of d / n goes through S, is mixed by R and comes out of T,
    (A h)_b = Σ_i Σ_a R_i[a, b] (h_a S_i) T_i
which costs n d ρ + n³ ρ + n r ρ a token instead of d r.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.delta import DeltaSpec
from lorakit.core.errors import BadParameter
from lorakit.core.shared import Shared
from lorakit.core.site import Site
from lorakit.parts.deltas.bottleneck import Bottleneck, Form


def phm(x: Tensor, R: Tensor, S: Tensor, T: Tensor) -> Tensor:
    """x Σ_i R_i ⊗ (S_i T_i): [.., n p] -> [.., n q] for R [n, n, n], S [n, p, ρ], T [n, ρ, q]."""
    blocks = x.unflatten(-1, (R.shape[1], -1))
    inner = torch.einsum("...ap,ipr->...air", blocks, S)
    mixed = torch.einsum("...air,iab->...bir", inner, R)
    return torch.einsum("...bir,irq->...bq", mixed, T).flatten(-2)


class Rule(Shared):
    """R [n, n, n] ~ N(0, std²)."""

    trains = frozenset({"R"})

    def __init__(self, n: int, std: float, *, rng: torch.Generator, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        drawn = torch.empty(n, n, n).normal_(0, std, generator=rng)
        self.R = nn.Parameter(drawn.to(device=device, dtype=dtype))


class Hypercomplex(Bottleneck):
    """S and T of both projections, AS [n, d/n, ρ], AT [n, ρ, r/n], BS [n, r/n, ρ], BT [n, ρ, d_out/n]; the rule is the pool's."""

    provides = frozenset({"module", "hypercomplex"})

    def __init__(self, site: Site, spec: "HypercomplexSpec", rule: Rule, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site, spec.form, site.d_out, dtype=dtype, device=device)
        self.rule = (rule,)  # in a tuple, so that it is not registered here
        n, rank = spec.n, spec.rank

        def factor(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

        self.AS, self.AT = factor(n, site.d_out // n, rank), factor(n, rank, self.r // n)
        self.BS, self.BT = factor(n, self.r // n, rank), factor(n, rank, site.d_out // n)

    def down(self, h: Tensor, bias: Tensor) -> Tensor:
        return phm(h, self.rule[0].R.to(h.dtype), self.AS.to(h.dtype), self.AT.to(h.dtype)) + bias

    def up(self, z: Tensor, bias: Tensor) -> Tensor:
        return phm(z, self.rule[0].R.to(z.dtype), self.BS.to(z.dtype), self.BT.to(z.dtype)) + bias


@dataclass(frozen=True)
class HypercomplexSpec(DeltaSpec):
    """`n`: Kronecker terms and the rule's size; `rank`: ρ of each S_i T_i; `std` of the rule's start."""

    form: Form
    n: int = 4
    rank: int = 1
    std: float = 0.01

    def __post_init__(self) -> None:
        if self.n < 1 or self.rank < 1:
            raise BadParameter(f"n={self.n} and rho={self.rank} must be at least 1")
        if self.std <= 0:
            raise BadParameter(f"rule_std={self.std} is not possible; a rule of zeros learns nothing, the official code has 0.0001 or 0.01")

    @property
    def provides(self) -> frozenset[str]:
        return Hypercomplex.provides

    @property
    def linear(self) -> bool:
        return False

    def pool(self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device) -> Rule:
        return Rule(self.n, self.std, rng=rng, dtype=dtype, device=device)

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Hypercomplex:
        assert isinstance(pool, Rule)
        return Hypercomplex(site, self, pool, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.form.rank.check(sites)
        for site in sites:
            r, _ = self.form.rank.at(site)
            for name, size in ((f"r={r}", r), (f"the width {site.d_out}", site.d_out)):
                if size % self.n:
                    raise BadParameter(f"n={self.n} does not divide {name} at site {site.name!r}; choose an n that divides both")

    def count(self, site: Site) -> int:
        r, _ = self.form.rank.at(site)
        return 2 * self.rank * (site.d_out + r) + self.form.count(site, site.d_out)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.n**3
