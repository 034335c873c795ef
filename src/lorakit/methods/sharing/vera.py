"""VeRA: one frozen random pair for all sites, and two trained vectors a site.

    ΔW = diag(b) · B · diag(d) · A        A: r × d_in, B: d_out × r, the first columns and rows of the one shared pair; no scale
    y  = W x + b ∘ B (d ∘ A dropout(x)) + bias

The shared pair is as large as the largest site on each side. It is drawn from `projection_prng_key`, not from the run's seed: A, then B,
U(±√(6 / fan_in)) with the fan_in of the whole shared matrix: the largest d_in for A, r for B. It is PEFT's for the same key, bit for bit.
Adapters of one base that have the key, r and the largest sizes in common have the pair in common.
`save_projection` False leaves the pair out of the adapter's file (`lorakit convert --compact` does it later): loading draws it again, which
is right as long as torch's CPU generator gives the same numbers. As plain LoRA the adapter has rank r, and LoRA's size.
Trained: d and b, r + d_out values a site. d = `d_initial`, b = 0, so ΔW = 0 at the start.
Defaults: PEFT's (r 256, d_initial 0.1, key 0). The paper trains the vectors at about ten times LoRA's learning rate (from memory).
References: arXiv:2310.11454; survey 5.1.3.

Use it when thousands of adapters are stored or shipped: two vectors a site, and one frozen pair that all share and a key redraws. It needs
a rate ten or more times LoRA's (at r 16 a rate of 1e-2 ended at 4.01, 5e-2 at 2.76, LoRA at 1e-3 at 2.89: log) and its step is no cheaper
than a LoRA's of its large r.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors, Product
from lorakit.core.errors import BadParameter
from lorakit.core.method import Method, method
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.ops.scaled import scaled
from lorakit.parts.inits.random import set_

LIMIT = 2**20
"""The largest side that a file without the pair can ask for."""


def projections(r: int, d_in: int, d_out: int, key: int) -> tuple[Tensor, Tensor]:
    """A [r, d_in], then B [d_out, r], from one generator on the CPU."""
    rng = torch.Generator().manual_seed(key)
    pair = []
    for shape in ((r, d_in), (d_out, r)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # in PEFT's order of operations: the last bit counts
        pair.append(torch.empty(shape).uniform_(-bound, bound, generator=rng))
    return pair[0], pair[1]


class Projections(Shared):
    """The frozen pair of the largest sizes. Not saved, it leaves `drawn` in the file: empty, its shape [0, d_in, d_out] says the sizes."""

    A: Tensor
    B: Tensor
    drawn: Tensor | None

    def __init__(self, spec: "VectorSpec", d_in: int, d_out: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        for name, shape in (("A", (spec.r, d_in)), ("B", (d_out, spec.r))):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=spec.save)
        self.register_buffer("drawn", None if spec.save else torch.empty(0, d_in, d_out, dtype=dtype, device=device))
        if device.type != "meta":
            A, B = projections(spec.r, d_in, d_out, spec.key)
            self.A.copy_(A), self.B.copy_(B)

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        """The pair may be larger than these sites need: that of an adapter of which some sites were dropped."""
        d_in, d_out = self.A.shape[1], self.B.shape[0]
        if "drawn" in shapes and len(shapes["drawn"]) == 3:
            d_in, d_out = (max(mine, min(theirs, LIMIT)) for mine, theirs in zip((d_in, d_out), shapes["drawn"][1:], strict=True))
        elif {"A", "B"} <= shapes.keys():
            d_in, d_out = max(d_in, shapes["A"][-1]), max(d_out, shapes["B"][0])
        if (d_in, d_out) != (self.A.shape[1], self.B.shape[0]):
            larger = Projections(self.spec, d_in, d_out, dtype=self.A.dtype, device=self.A.device)
            self.A, self.B, self.drawn = larger.A, larger.B, larger.drawn
        super().fit(shapes)


class Scaling(Delta):
    """One site's d [r] and b [d_out]; the pair is the pool's."""

    trains = frozenset({"d", "b"})

    def __init__(self, site: Site, spec: "VectorSpec", pool: Projections, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.p, self.stream, self.draws = spec.dropout, random.stream(site.name), spec.dropout > 0
        self.provides, self.shape = spec.provides, (site.d_out, site.d_in)
        self.pools = (pool,)  # in a tuple, so that it is registered once, at the model's root
        self.d = nn.Parameter(torch.zeros(spec.r, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(site.d_out, dtype=dtype, device=device))

    def pair(self) -> tuple[Tensor, Tensor]:
        """This site's A [r, d_in] and B [d_out, r]."""
        (pool,) = self.pools
        return pool.A[:, : self.shape[1]], pool.B[: self.shape[0]]

    def product(self, ctx: Ctx) -> Product:
        A, B = self.pair()
        return Product(A, B, g=self.d, b=self.b)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        A, B = self.pair()
        return scaled(x, A, self.d, B, self.b)

    def weight(self) -> Tensor:
        A, B = self.pair()
        return (self.b[:, None] * B) @ (self.d[:, None] * A)

    def factors(self) -> Factors:
        A, B = self.pair()
        return Factors(A, self.b[:, None] * B * self.d, 1.0)

    def bound(self) -> int:
        return min(len(self.d), *self.shape)


@dataclass(frozen=True)
class VectorSpec(DeltaSpec):
    """Rank, the key of the pair and whether it is saved, input dropout."""

    r: int
    key: int
    save: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise BadParameter(f"r={self.r} is not possible; VeRA's r is at least 1 (256 in PEFT)")
        if not 0 <= self.dropout < 1:
            raise BadParameter(f"dropout={self.dropout} is not a probability; expected 0 <= dropout < 1")

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"factors", "vectors"})

    def pool(
        self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Projections:
        d_in, d_out = max((s.d_in for s in sites), default=1), max((s.d_out for s in sites), default=1)
        return Projections(self, d_in, d_out, dtype=dtype, device=device)

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Scaling:
        assert isinstance(pool, Projections)
        return Scaling(site, self, pool, dtype=dtype, device=device)

    def count(self, site: Site) -> int:
        return self.r + site.d_out


@dataclass(frozen=True)
class Vectors:
    """d = `d_initial`, b = 0."""

    d_initial: float = 0.1
    requires: frozenset[str] = frozenset({"vectors"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Scaling)
        set_(delta.d, torch.full(delta.d.shape, self.d_initial, dtype=torch.float64))


@method("vera", paper="arXiv:2310.11454", survey="5.1.3", kind="shared factors")
def vera(
    r: int = 256,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    projection_prng_key: int = 0,
    save_projection: bool = True,
    d_initial: float = 0.1,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """Two trained vectors a site scale one frozen random pair that all sites share."""
    spec = VectorSpec(r, projection_prng_key, save_projection, dropout)
    return Method(spec, Vectors(d_initial), sites=sites, unfreeze=unfreeze)
