"""VB-LoRA: the factors are put together from a bank of short vectors that all sites share.

    A, B are cut into sub-vectors of length b: the rows of A, the columns of B        V: h × b, the bank
    u = Σ_i softmax(σ_topk)_i V_i        σ ∈ R^h: a sub-vector's logits, i over the `topk` largest of them
    ΔW = B A        A: r × d_in from logits [r, d_in / b, h], B: d_out × r from logits [d_out / b, r, h]; no scale

h is `num_vectors`, b `vector_length`, which must divide every d_in and d_out. Only chosen vectors and their logits get gradients; which
are chosen changes as the logits do. The bank's gradient sums over all sites. As plain LoRA the adapter has rank r and LoRA's size.
Trained: the bank, and r (d_in + d_out) / b · h logits a site. V ~ U(±`bank_bound`), logits ~ N(0, `logits_std`²): neither factor is zero,
so ΔW is small at the start, but not zero.
Three learning rates: the run's for the bank, `logits_ratio` times as much for the logits, `head_ratio` times for modules trained whole.
`compact` is what a finished adapter needs: of every sub-vector's logits the choice alone, `topk` indices and `topk` − 1 weights, as they
sum to one. `lorakit convert --compact` makes it. It can be merged and exported but not trained: the other logits are gone.
Defaults: r 4, topk 2, num_vectors 90, vector_length 256, rates of 1e-3 and 1e-2 (the official RoBERTa scripts, whose heads have rates of
2e-3 to 2e-2; Llama 2 7B has 2048 vectors), bank_bound 0.02, logits_std 0.1 (PEFT). The scripts decay weights by 0.1, logits included.
References: arXiv:2405.15179; survey 5.1.3.

Use it when disk per adapter counts for everything and a bank of vectors can be shared: `--compact` leaves indices and weights alone.
Training holds logits for the whole bank, and it moved only at ten times the official scripts' rates on our base (log).
"""

import math
from collections.abc import Sequence
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
from lorakit.ops import reference as ops
from lorakit.parts.inits.random import normal, set_
from lorakit.parts.optimizers.adamw import AdamW

INDICES = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32}
"""The smallest type that holds the indices of fewer vectors than this."""


class Bank(Shared):
    """V [h, b]."""

    def __init__(self, spec: "BankSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.trains = frozenset() if spec.compact else frozenset({"V"})
        self.V = nn.Parameter(torch.zeros(spec.vectors, spec.length, dtype=dtype, device=device), requires_grad=not spec.compact)

    def roles(self) -> dict[str, str]:
        return {"V": "bank"}


class Composed(Delta):
    """One site's logits of A [r, d_in / b, h] and B [d_out / b, r, h]; compact: indices [.., k] and weights [.., k − 1] instead."""

    def __init__(self, site: Site, spec: "BankSpec", pool: Bank, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.p, self.stream, self.draws = spec.dropout, random.stream(site.name), spec.dropout > 0
        self.provides, self.r, self.k, self.compact = spec.provides, spec.r, spec.topk, spec.compact
        self.banks = (pool,)  # in a tuple, so that it is registered once, at the model's root
        for name, shape in spec.cut(site).items():
            if self.compact:
                indices = next(kind for most, kind in INDICES.items() if spec.vectors < most)
                self.register_buffer(f"{name}_indices", torch.zeros(*shape, spec.topk, dtype=indices, device=device))
                self.register_buffer(f"{name}_weights", torch.zeros(*shape, spec.topk - 1, dtype=dtype, device=device))
            else:
                self.register_parameter(f"{name}_logits", nn.Parameter(torch.zeros(*shape, spec.vectors, dtype=dtype, device=device)))
        self.trains = frozenset(name for name, _ in self.named_parameters())

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [r, d_in], B [d_out, r]."""
        (bank,) = self.banks
        A, B = (ops.compose(*self._choice(name), bank.V) for name in "AB")  # [r, d_in / b, b], [d_out / b, r, b]
        return A.flatten(1), B.transpose(1, 2).flatten(0, 1)

    def product(self, ctx: Ctx) -> Product:
        return Product(*self.matrices())

    def weight(self) -> Tensor:
        A, B = self.matrices()
        return B @ A

    def factors(self) -> Factors:
        return Factors(*self.matrices(), 1.0)

    def bound(self) -> int:
        return self.r

    def roles(self) -> dict[str, str]:
        return dict.fromkeys(self.trains, "logits")

    def _choice(self, name: str) -> tuple[Tensor, Tensor]:
        if not self.compact:
            return ops.choose(self.get_parameter(f"{name}_logits"), self.k)
        first, indices = self.get_buffer(f"{name}_weights"), self.get_buffer(f"{name}_indices").int()
        # the remainder, so that no file can ask for a vector that is not there
        return torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1), indices % len(self.banks[0].V)


@dataclass(frozen=True)
class BankSpec(DeltaSpec):
    """Rank, how many vectors of what length, how many of them make a sub-vector, how far the bank starts from zero."""

    r: int
    vectors: int
    length: int
    topk: int
    bound: float
    dropout: float = 0.0
    compact: bool = False

    def __post_init__(self) -> None:
        if min(self.r, self.length) < 1 or not 1 <= self.topk <= self.vectors:
            raise BadParameter(
                f"r={self.r}, vector_length={self.length}, topk={self.topk} of num_vectors={self.vectors} are not possible: "
                "all are at least 1, and no more vectors are chosen than there are"
            )
        if not 0 <= self.dropout < 1:
            raise BadParameter(f"dropout={self.dropout} is not a probability; expected 0 <= dropout < 1")

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"factors", "logits"})

    def pool(self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device) -> Bank:
        bank = Bank(self, dtype=dtype, device=device)
        set_(bank.V, torch.empty(bank.V.shape).uniform_(-self.bound, self.bound, generator=rng))
        return bank

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Composed:
        assert isinstance(pool, Bank)
        return Composed(site, self, pool, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        if self.compact:
            raise BadParameter("compact=True is the form of a finished adapter, of which nothing can be trained; leave it out to train")
        common = math.gcd(*(d for s in sites for d in (s.d_in, s.d_out)))
        if common % self.length:
            raise BadParameter(
                f"vector_length={self.length} does not divide the sides of all {len(sites)} sites; use {common} or a divisor"
            )

    def cut(self, site: Site) -> dict[str, tuple[int, int]]:
        """How many sub-vectors A and B have. Raises BadParameter when the sides are no multiples of their length."""
        if site.d_in % self.length or site.d_out % self.length:
            raise BadParameter(f"vector_length={self.length} does not divide both sides of {site.name!r} ({site.d_out} × {site.d_in})")
        return {"A": (self.r, site.d_in // self.length), "B": (site.d_out // self.length, self.r)}

    def count(self, site: Site) -> int:
        return 0 if self.compact else sum(math.prod(shape) for shape in self.cut(site).values()) * self.vectors

    def count_shared(self, sites: Sequence[Site]) -> int:
        return 0 if self.compact else self.vectors * self.length


@dataclass(frozen=True)
class RandomLogits:
    """All logits ~ N(0, std²)."""

    std: float = 0.1
    requires: frozenset[str] = frozenset({"logits"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        for name in "AB":
            logits = delta.get_parameter(f"{name}_logits")
            set_(logits, normal(logits, self.std, rng))


@method("vb_lora", paper="arXiv:2405.15179", survey="5.1.3", kind="shared factors")
def vb_lora(
    r: int = 4,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    num_vectors: int = 90,
    vector_length: int = 256,
    topk: int = 2,
    bank_bound: float = 0.02,
    logits_std: float = 0.1,
    logits_ratio: float = 10.0,
    head_ratio: float = 4.0,
    compact: bool = False,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA whose factors are mixtures of a few vectors from one bank."""
    if min(logits_ratio, head_ratio) <= 0:
        raise BadParameter(f"logits_ratio={logits_ratio} and head_ratio={head_ratio} multiply the learning rate and must exceed 0")
    spec = BankSpec(r, num_vectors, vector_length, topk, bank_bound, dropout, compact)
    optim = AdamW(ratios=(("logits", logits_ratio), ("full", head_ratio)))
    return Method(spec, RandomLogits(logits_std), sites=sites, unfreeze=unfreeze, optim=optim, identity=False)
