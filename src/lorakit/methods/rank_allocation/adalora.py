"""AdaLoRA: adaptive budget allocation.

    ΔW = s · B diag(g) A        s = alpha / (r + 1e-5), r the initial rank, never changed when triplets are pruned
    loss + orth · mean over all A, B of ‖A Aᵀ − I‖_F, ‖BᵀB − I‖_F        (un-squared, as all code has it; the paper squares and sums)

Importance of every element w at every step t < T − t_f:  I = |w · ∂L/∂w|,  Ī ← β₁Ī + (1−β₁)I,  Ū ← β₂Ū + (1−β₂)|I − Ī|,  s(w) = Ī·Ū.
A triplet scores S_i = s(g_i) + mean_j s(A_ij) + mean_j s(B_ji). Over all sites jointly the budget falls by a cubic,

    b(t) = b_T + (b_0 − b_T) (1 − (t − t_i) / (T − t_i − t_f))³        b_0 = n·r, b_T = n·target_r

where t_i, t_f are `tinit`, `tfinal` and β₁, β₂ `beta1`, `beta2`. Every `delta_t` steps g is set to zero outside the b(t) best
triplets. A and B stay, so a pruned triplet can come back, until the last t_f steps, whose mask is fixed. At the end exactly b_T triplets
are left, with t_f = 0 too, so that what is trained is what is saved.
Trained: A, B, g: r (d_in + d_out + 1) a site. A, B ~ N(0, 0.02²), g = 0. w is read after the optimizer's step, its gradient before
clipping.
Defaults: r 12, target_r 8, β 0.85, orth 0.5, t_i = t_f = 0, delta_t 1 (PEFT); the paper has r = 1.5 target_r, orth 0.1, alpha 16 or 32, and
t_i, t_f of several thousand steps.
References: arXiv:2303.10512; survey 3.2.1.

Use it when sites differ in how much rank they need and the run is long enough for a schedule (thousands of steps, `tinit` and `tfinal` set)
on a fixed budget. Not for short runs: importance is an average over steps, and a budget that falls from the first step prunes noise. It
trains r components from the first step, so training itself gets no cheaper: what is saved is in the finished adapter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core.errors import BadParameter
from lorakit.core.events import Controller, Run, Step
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.parts.inits.random import Gaussian
from lorakit.parts.penalties.orthogonal import Orthogonal


@dataclass(frozen=True)
class BudgetSpec:
    """The schedule and the smoothing, as values."""

    r: int
    target_r: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float
    requires: frozenset[str] = frozenset({"gate"})

    def __post_init__(self) -> None:
        if not 1 <= self.target_r <= self.r:
            raise BadParameter(f"target_r={self.target_r} must lie between 1 and the initial rank r={self.r}")
        if self.delta_t < 1 or self.tinit < 0 or self.tfinal < 0:
            raise BadParameter(f"delta_t={self.delta_t} must be at least 1, tinit={self.tinit} and tfinal={self.tfinal} at least 0")

    def build(self, run: Run) -> "Budget":
        if self.tinit + self.tfinal >= run.total:
            late = f"tinit={self.tinit} + tfinal={self.tfinal}"
            raise BadParameter(f"{late} leave no step of this run's {run.total} for allocating the budget")
        gated = [b.delta for b in run.adapted.branches() if isinstance(b.delta, LowRank) and b.delta.g is not None]
        return Budget(self, gated, run.total)

    def at(self, t: int, total: int, n: int) -> int:
        """b(t) for n sites."""
        b0, bT = n * self.r, n * self.target_r
        if t <= self.tinit:
            return b0
        if t > total - self.tfinal:
            return bT
        left = 1 - (t - self.tinit) / (total - self.tfinal - self.tinit)
        return int((b0 - bT) * left**3 + bT)

    def masks_at(self, t: int, total: int) -> bool:
        """Whether g is masked after step t."""
        return t > self.tinit and (t >= total - self.tfinal or t % self.delta_t == 0)


class Budget(Controller):
    """Scores triplets and keeps the best b(t) of all sites together."""

    def __init__(self, spec: BudgetSpec, deltas: list[LowRank], total: int) -> None:
        self.spec, self.deltas, self.total = spec, deltas, total
        self.mean = [[torch.zeros_like(w) for w in _gated(d)] for d in deltas]
        self.spread = [[torch.zeros_like(w) for w in _gated(d)] for d in deltas]
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        t = step.index
        if t < self.total - self.spec.tfinal:
            self._score(step.clip)
        if self.spec.masks_at(t, self.total):
            if not (self.kept and t > self.total - self.spec.tfinal):  # the last phase keeps its first mask
                self.kept = self._best(self.spec.at(t, self.total, len(self.deltas)))
            self._mask()

    @torch.no_grad()
    def finish(self) -> None:
        target = len(self.deltas) * self.spec.target_r
        if self.spec.tfinal == 0 or sum(int(k.sum()) for k in self.kept) != target:  # no last phase, or the run ended before it
            self.kept = self._best(target)
        self._mask()

    def scores(self) -> list[Tensor]:
        """S per site: [r]."""
        out = []
        for mean, spread in zip(self.mean, self.spread, strict=True):
            A, B, g = (m * u for m, u in zip(mean, spread, strict=True))
            out.append(g + A.mean(1) + B.mean(0))
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.spread, self.kept = state["mean"], state["spread"], state["kept"]

    def _score(self, clip: float) -> None:
        for i, delta in enumerate(self.deltas):
            for j, w in enumerate(_gated(delta)):
                if w.grad is None:
                    continue
                mean, spread = self.mean[i][j], self.spread[i][j]
                now = (w * (w.grad / clip)).abs()
                mean.mul_(self.spec.beta1).add_(now, alpha=1 - self.spec.beta1)
                spread.mul_(self.spec.beta2).add_((now - mean).abs(), alpha=1 - self.spec.beta2)

    def _best(self, budget: int) -> list[Tensor]:
        """Boolean masks that keep exactly `budget` triplets; ties go to the earlier one."""
        scores = self.scores()
        order = torch.cat(scores).sort(descending=True, stable=True).indices
        kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        kept[order[:budget]] = True
        return list(kept.split([len(s) for s in scores]))

    def _mask(self) -> None:
        for delta, kept in zip(self.deltas, self.kept, strict=True):
            _gated(delta)[2].mul_(kept)


def _gated(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, g."""
    assert delta.g is not None
    return delta.A, delta.B, delta.g


@method("adalora", paper="arXiv:2303.10512", survey="3.2.1", kind="controller")
def adalora(
    r: int = 12,
    target_r: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    tinit: int = 0,
    tfinal: int = 0,
    delta_t: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth: float = 0.5,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA in SVD form whose ranks are pruned by importance to a global budget."""
    spec = LowRankSpec(Rank.of(r, alpha, rule="guarded"), dropout, train=("A", "B", "g"), gate=True)
    budget = BudgetSpec(r, target_r, tinit, tfinal, delta_t, beta1, beta2)
    return Method(spec, Gaussian(), sites=sites, unfreeze=unfreeze, penalties=(Orthogonal(orth),), controllers=(budget,))
