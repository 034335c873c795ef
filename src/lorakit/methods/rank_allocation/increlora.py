"""IncreLoRA: incremental parameter allocation.

    ΔW = s · B diag(g) A        s = alpha / target_r, fixed; g the λ of the paper, of either sign

Every site starts with `init_r` components. Its score is S = Σ |ΔW ∘ ∂L/∂ΔW| / √(d_out d_in), summed over the micro-batches of a step,
smoothed as in `adalora` (Ī, Ū by `beta1`, `beta2`; importance Ī·Ū). The sites of highest importance get new components, until there are
n · target_r over all n sites, exactly.
Advance learning: each site holds `add` further components in reserve, A and B trained, g = 1e-5 fixed. When a site is chosen, reserves get
their g trained and new ones follow; at the end reserves are dropped. Restart warm-up: what is new learns at a rate that rises from 0 over
`ramp` steps, as a share of the run's own schedule.
With `interval` > 0, `top_h` sites grow by `add` every so many steps after `warmup`, as in the paper, and a run too short for it is refused;
with 0 growth is spread evenly from `warmup` to 70 % of the run. The official code lets s shrink as ranks grow, which rescales what was
learned, and may overshoot the target; neither is done here. A step's gradient is divided by its tokens.
Trained: A, B, g: (init_r + add) (d_in + d_out + 1) a site at the start. A, B ~ N(0, 0.02²), g = 0.
Defaults: init_r 1, target_r 8, add 4, top_h 2, β 0.85, orth 0.1, alpha 16 (official; there interval and warmup 1000, dropout 0.2 for MNLI);
interval 0 and ramp 10 are ours.
References: arXiv:2308.12043; survey 3.2.1.

Use it when the budget should grow instead of shrink: training starts at a few components a site and spends rank where the loss asks for it,
within a fixed total. Not when the finished adapter is to be trained further: its reserves are gone at the end, and going on from it is
refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core import random
from lorakit.core.errors import BadParameter
from lorakit.core.events import Controller, Run, Step
from lorakit.core.layer import Branch
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.parts.inits.random import Gaussian, normal
from lorakit.parts.penalties.orthogonal import Orthogonal

RESERVE = 1e-5
"""g of a component in reserve."""
STD = 0.02
UNTIL = 0.7
"""The share of the run by which growth is over when no interval is given."""


@dataclass(frozen=True)
class GrowthSpec:
    """The schedule of the growth, as values."""

    init_r: int
    target_r: int
    add: int
    top_h: int
    interval: int
    warmup: int
    ramp: int
    beta1: float
    beta2: float
    requires: frozenset[str] = frozenset({"gate"})
    fresh: bool = True
    """It cannot go on from a finished adapter, whose reserves are gone (train/beginning.py)."""

    def __post_init__(self) -> None:
        if not 1 <= self.init_r <= self.target_r:
            raise BadParameter(f"init_r={self.init_r} must lie between 1 and target_r={self.target_r}")
        if min(self.add, self.top_h) < 1 or min(self.interval, self.warmup, self.ramp) < 0:
            raise BadParameter("add and top_h must be at least 1; interval, warmup and ramp at least 0")

    def build(self, run: Run) -> "Growth":
        growth = Growth(self, run)
        most = [min(b.site.d_in, b.site.d_out) - self.add for b in growth.branches]
        n, goal = len(most), len(most) * self.target_r
        if sum(most) < goal:
            raise BadParameter(
                f"target_r={self.target_r} is {goal} components at {n} sites, which have room for {sum(most)} beside add={self.add} in "
                "reserve at each; lower target_r or add"
            )
        if (reached := self.reached(run.total, most)) < goal:
            events = -(-n * (self.target_r - self.init_r) // (self.top_h * self.add))
            steps = f", that is {self.warmup + events * self.interval + 1} steps" if self.interval else ""
            raise BadParameter(
                f"{n} sites need {events} growths{steps}, to reach target_r={self.target_r}; in this run's {run.total} steps they get "
                f"{reached} of {goal} components: train longer, raise add, lower warmup" + (", or set interval=0" if self.interval else "")
            )
        return growth

    def reached(self, total: int, most: list[int]) -> int:
        """Components at the end of a run over sites that can have so many each and get at most `add` a step, the same ones first."""
        ranks = [self.init_r] * len(most)
        for t in range(total):
            left = self.at(t, total, len(most)) - sum(ranks)
            for i in range(len(most)) if left > 0 else ():
                more = max(0, min(self.add, left, most[i] - ranks[i]))
                ranks[i], left = ranks[i] + more, left - more
        return sum(ranks)

    def at(self, t: int, total: int, n: int) -> int:
        """Components that n sites may have at step t."""
        start, end = n * self.init_r, n * self.target_r
        if self.interval:
            return min(end, start + max(0, (t - self.warmup) // self.interval) * self.top_h * self.add)
        last = max(self.warmup + 1, int(UNTIL * total)) if total > self.warmup + 1 else total - 1
        share = (t - self.warmup) / max(1, last - self.warmup)
        return start + int((end - start) * min(1.0, max(0.0, share)))


class Growth(Controller):
    """Scores sites and gives the best of them new components."""

    def __init__(self, spec: GrowthSpec, run: Run) -> None:
        self.spec, self.run = spec, run
        self.branches = [b for b in run.adapted.branches() if isinstance(b.delta, LowRank)]
        self.now, self.mean, self.spread = (torch.zeros(len(self.branches), dtype=torch.float64) for _ in range(3))
        self.born = [[-spec.ramp - 1] * delta.r for delta in self.deltas]  # by component: when its A and B began to learn
        self.lit = [[-spec.ramp - 1] * delta.r for delta in self.deltas]  # and its g
        self.hooks = [branch.delta.register_forward_hook(self._watch(i, branch)) for i, branch in enumerate(self.branches)]
        self.before: list[list[Tensor]] = []

    @property
    def deltas(self) -> list[LowRank]:
        return [b.delta for b in self.branches]  # type: ignore[misc]

    def start(self) -> None:
        for delta in self.deltas:
            self._hold(delta)

    def before_forward(self, step: Step) -> None:
        self.now.zero_()
        n, add = len(self.branches), self.spec.add
        left = self.spec.at(step.index, step.total, n) - sum(delta.r - add for delta in self.deltas)
        for i in (self.mean * self.spread).argsort(descending=True, stable=True).tolist():
            more = min(add, left, self._room(i))
            if more > 0:
                self._grow(i, more, step.index)
                left -= more

    def after_backward(self, step: Step) -> None:
        for delta in self.deltas:
            if delta.g is not None and delta.g.grad is not None:
                delta.g.grad[-self.spec.add :] = 0
        young = [any(step.index - at < self.spec.ramp for at in (*born, *lit)) for born, lit in zip(self.born, self.lit, strict=True)]
        self.before = [[w.detach().clone() for w in _tensors(d)] if some else [] for d, some in zip(self.deltas, young, strict=True)]

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        for delta, before, born, lit in zip(self.deltas, self.before, self.born, self.lit, strict=True):
            pair, gate = (self._shares(since, step.index).to(delta.A) for since in (born, lit))
            for w, old, share in zip(_tensors(delta), before, (pair[:, None], pair, gate), strict=False):  # none where nothing is young
                w.copy_(torch.where(share == 1, w, old + share * (w - old)))
            self._hold(delta)
        self.run.total_(self.now)
        beta1, beta2 = self.spec.beta1, self.spec.beta2
        self.mean.mul_(beta1).add_(self.now, alpha=1 - beta1)
        self.spread.mul_(beta2).add_((self.now - self.mean).abs(), alpha=1 - beta2)

    @torch.no_grad()
    def finish(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for delta in self.deltas:
            delta.keep(torch.arange(delta.r - self.spec.add, device=delta.A.device))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread, "born": self.born, "lit": self.lit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.spread, self.born, self.lit = state["mean"], state["spread"], state["born"], state["lit"]

    def _shares(self, since: list[int], t: int) -> Tensor:
        """By component, the share of the run's rate that it learns at: 0 when new, 1 after `ramp` steps."""
        return torch.tensor([min(1.0, (t - at) / self.spec.ramp) if self.spec.ramp else 1.0 for at in since])

    def _watch(self, i: int, branch: Branch) -> Callable[..., None]:
        """A forward hook whose backward adds this micro-batch's Σ |ΔW ∘ ∂L/∂ΔW|, never keeping the dense gradient."""

        def hook(delta: LowRank, args: tuple[Tensor, Any], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda dy: self._score(i, branch, args[0].detach(), dy))

        return hook

    def _score(self, i: int, branch: Branch, x: Tensor, dy: Tensor) -> None:
        site, W = branch.site, branch.delta.weight().detach()
        grads = dy.detach().flatten(0, -2).to(W.dtype)
        if x.is_floating_point():
            G = grads.T @ x.flatten(0, -2).to(W.dtype)
        else:
            G = W.new_zeros(W.shape).index_add_(1, x.flatten(), grads.T)
        self.now[i] += float((W * G).abs().sum()) / len(grads) / (site.d_in * site.d_out) ** 0.5

    def _room(self, i: int) -> int:
        site = self.branches[i].site
        return min(site.d_in, site.d_out) - self.deltas[i].r

    def _grow(self, i: int, more: int, t: int) -> None:
        """Put `more` reserves to work and append as many new ones."""
        delta, old = self.deltas[i], self.deltas[i].r
        rng = random.generator(self.run.adapted.seed, f"{self.branches[i].site.name}:{old}")
        delta.resize(old + more, self.run.optimizer)
        with torch.no_grad():
            delta.A[old:] = normal(delta.A[old:], STD, rng).to(delta.A)
            delta.B[:, old:] = normal(delta.B[:, old:], STD, rng).to(delta.B)
        self.born[i] += [t] * more
        self.lit[i][old - self.spec.add : old - self.spec.add + more] = [t] * more
        self.lit[i] += [t] * more
        self._hold(delta)

    @torch.no_grad()
    def _hold(self, delta: LowRank) -> None:
        assert delta.g is not None
        delta.g[-self.spec.add :] = RESERVE


def _tensors(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    assert delta.g is not None
    return delta.A, delta.B, delta.g


@method("increlora", paper="arXiv:2308.12043", survey="3.2.1", kind="controller")
def increlora(
    init_r: int = 1,
    target_r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    add: int = 4,
    top_h: int = 2,
    interval: int = 0,
    warmup: int = 0,
    ramp: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orth: float = 0.1,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA in SVD form whose ranks grow, site by site, to a global budget."""
    r = init_r + add
    growth = GrowthSpec(init_r, target_r, add, top_h, interval, warmup, ramp, beta1, beta2)
    spec = LowRankSpec(Rank.of(r, alpha * r / target_r), dropout, train=("A", "B", "g"), gate=True, flexible=True)
    return Method(spec, Gaussian(STD), sites=sites, unfreeze=unfreeze, penalties=(Orthogonal(orth),), controllers=(growth,))
