"""Delta-LoRA: the frozen weight moves with the difference of B A.

    after every step t > K:   W ← W + λ s (B_{t+1} A_{t+1} − B_t A_t)        λ `ratio`, K `start`, s = alpha / r

The sum telescopes (λ is constant), so W need not be touched: at any time

    ΔW = s ((1 + λ) B A − λ B_K A_K)        rank at most 2r: [(1 + λ) B, −λ B_K] · [A; A_K]

which is what is computed here, with the snapshot (A_K, B_K) taken before step K. A and B get the gradient of s B A x alone, as in the
paper, where W is moved but not differentiated; x gets that of the whole ΔW. The base stays shared, a bf16 W loses no small update, and
the rank is bounded (the paper's claim of a full-rank update does not hold for a constant λ).
Trained: A and B, r (d_in + d_out) a site; stored besides: the snapshot, as many numbers again. Until step K it is LoRA. No dropout: ∂L/∂W
and ∂L/∂(B A) must agree. Weight decay on A and B moves W too.
Defaults: λ 2, K 500 (the algorithm as others quote it); r, alpha as `lora`.
References: arXiv:2309.02411; survey 3.1.3.

Use it when the target moves during training, so that a correction of the snapshot helps. On a target that stands still it did not beat LoRA
at the same rank (log), the claimed full rank does not follow from its equations, and it stores twice LoRA's numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors, Product
from lorakit.core.errors import BadParameter
from lorakit.core.events import Controller, Run, Step
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import Kaiming


class CoUpdated(Delta):
    """A [r, d_in], B [d_out, r] trained; A_K, B_K of their shapes and lam [1] (0 before the snapshot) kept."""

    provides = frozenset({"factors", "snapshot"})
    trains = frozenset({"A", "B"})
    A: nn.Parameter
    B: nn.Parameter
    A_K: Tensor
    B_K: Tensor
    lam: Tensor

    def __init__(self, site: Site, rank: Rank, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        r, self.s = rank.at(site)
        for name, shape in (("A", (r, site.d_in)), ("B", (site.d_out, r))):
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(zeros))
            self.register_buffer(name + "_K", zeros.clone())
        self.register_buffer("lam", torch.zeros(1, dtype=dtype, device=device))

    def product(self, ctx: Ctx) -> Product:
        f = self._factors(_slowed(self.A, self.lam), _slowed(self.B, self.lam))
        return Product(f.A, f.B, f.s)

    def weight(self) -> Tensor:
        f = self.factors()
        return f.s * (f.B @ f.A)

    def factors(self) -> Factors:
        return self._factors(self.A, self.B)

    def bound(self) -> int:
        return 2 * len(self.A)

    @torch.no_grad()
    def snapshot(self, ratio: float) -> None:
        """From here on the base moves with what B A becomes."""
        self.A_K.copy_(self.A)
        self.B_K.copy_(self.B)
        self.lam.fill_(ratio)

    def _factors(self, A: Tensor, B: Tensor) -> Factors:
        return Factors(torch.cat([A, self.A_K]), torch.cat([(1 + self.lam) * B, -self.lam * self.B_K], dim=1), self.s)


def _slowed(w: Tensor, lam: Tensor) -> Tensor:
    """w, whose gradient is divided by 1 + λ."""
    return w.detach() + (w - w.detach()) / (1 + lam)


@dataclass(frozen=True)
class CoUpdatedSpec(DeltaSpec):
    """Rank and scale."""

    rank: Rank
    provides = CoUpdated.provides

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> CoUpdated:
        return CoUpdated(site, self.rank, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.rank.check(sites)

    def count(self, site: Site) -> int:
        return self.rank.at(site)[0] * (site.d_in + site.d_out)


@dataclass(frozen=True)
class CoUpdate:
    """Takes the snapshot before step `start`."""

    ratio: float
    start: int
    requires: frozenset[str] = frozenset({"snapshot"})

    def __post_init__(self) -> None:
        if self.start < 0 or self.ratio <= -1:
            raise BadParameter(f"start={self.start} must be at least 0 and ratio={self.ratio} more than -1")

    def build(self, run: Run) -> Controller:
        return _CoUpdate(self, [b.delta for b in run.adapted.branches() if isinstance(b.delta, CoUpdated)])


class _CoUpdate(Controller):
    def __init__(self, spec: CoUpdate, deltas: list[CoUpdated]) -> None:
        self.spec, self.deltas = spec, deltas

    def before_forward(self, step: Step) -> None:
        if step.index == self.spec.start:
            for delta in self.deltas:
                delta.snapshot(self.spec.ratio)


@method("delta_lora", paper="arXiv:2309.02411", survey="3.1.3", kind="delta")
def delta_lora(
    r: int = 8,
    alpha: float = 16.0,
    ratio: float = 2.0,
    start: int = 500,
    sites: Where = "all-linear",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA whose product moves the frozen weight too, kept as a pair of rank 2r."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    return Method(CoUpdatedSpec(rank), Kaiming(), sites=sites, unfreeze=unfreeze, controllers=(CoUpdate(ratio, start),))
