"""InfLoRA: interference-free low-rank adaptation for continual learning.

    y = W x + s Σ_{τ ≤ t} B_τ A_τ x + bias        A_t: r × d_in frozen, B_t: d_out × r trained from zero; earlier pairs frozen
    H = Σ x xᵀ over task t's inputs, taken before it        (I − M Mᵀ) H = U Σ Vᵀ        A_t = U[:, 1..r]ᵀ / √3
    M: orthonormal directions that earlier tasks use. After task t, with H taken anew, the left singular vectors of (I − M Mᵀ) H are
    added one by one until ‖M Mᵀ H‖² ≥ ε_t ‖H‖²        ε_t = lamb + (lame − lamb) · t / T, t from 0 on, T tasks

A_t looks only where no earlier task has inputs, so training B_t leaves their outputs alone: B_t A_t M = 0. DualGPM: M is kept by a basis
of itself or, once it is more than half of the space, of its complement. ‖H‖² sums σ⁴ of the inputs, not σ²: thresholds near 1 suit that
(official code). Where fewer than r directions are left, the rest of A_t is zero; when none is, a task learns nothing.
H counts every token that is no padding, with a label or not, since keys and values of all of them reach the loss.
Trained: B, r d_out a site. For tasks in sequence: --train-data given several times; with one task it is LoRA with A frozen at the inputs'
main directions. Every pair stays in the adapter: after t tasks it is plain LoRA of rank t r. M is in checkpoints, not in the adapter. A
classifier that is trained whole (`unfreeze`) is shared by the tasks and forgets; the paper has a new one for each.
`batches` of the training data are seen before and after each task, 0 for all. H costs d_in² numbers a site, M at most half of that.
Defaults: r 10, alpha 10 (so s = 1), lamb 0.95, lame 1.0 (CIFAR-100; ImageNet-R 0.98), no dropout, keys and values (`sites` kv) as in
the official code, which sees all data; 64 batches are our choice.
References: arXiv:2404.00228; survey 2.4.

Use it when tasks come one after another and the earlier ones must keep their outputs, without their data. A task whose inputs look like an
earlier one's learns nothing, on purpose; for a single task take `lora`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.calibrate import INPUTS, Seen, observe
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter
from lorakit.core.events import Calibrated, Controller, Run, Task
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Site, Where
from lorakit.parts.controllers.dual_gpm import Memory
from lorakit.parts.inits.random import set_
from lorakit.parts.inits.triplets import signs

LARGEST = 16384


def designed(memory: Memory, H: Tensor, r: int) -> Tensor:
    """A [r, d_in] for a task with inputs H, where the memory has no direction."""
    A = memory.ranked(H)[0][:, :r].T
    A = signs(A) * A / 3**0.5
    return torch.cat([A, A.new_zeros(r - len(A), A.shape[1])])


def covariance(site: Site, seen: Seen) -> Tensor:
    """H [d_in, d_in]; of ids, the diagonal of their counts."""
    assert seen.moment is not None
    if seen.moment.dim() == 2:
        return seen.moment
    if site.d_in > LARGEST:
        raise BadParameter(f"InfLoRA keeps d_in × d_in numbers a site; {site.name!r} has {site.d_in} ids: leave it out of sites")
    return torch.diag(seen.moment)


@dataclass(frozen=True)
class FirstTask(Calibrated):
    """A₁ from the first task's inputs, B₁ = 0."""

    batches: int
    requires: frozenset[str] = frozenset({"factors", "legs"})
    needs: frozenset[str] = frozenset({INPUTS})

    def fit(self, seen: Mapping[str, Seen], sites: Sequence[Site]) -> "Designed":
        return Designed({site.name: covariance(site, seen[site.name]) for site in sites})


@dataclass(frozen=True)
class Designed:
    """The init that follows from the inputs."""

    found: Mapping[str, Tensor]
    requires: frozenset[str] = frozenset({"factors"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, LowRank)
        set_(delta.A, designed(Memory.empty(site.d_in), self.found[site.name], delta.r))


@dataclass(frozen=True)
class BordersSpec:
    """How much of each task the memory holds, and how many batches of it are seen."""

    lamb: float
    lame: float
    batches: int
    requires: frozenset[str] = frozenset({"factors", "legs"})

    def __post_init__(self) -> None:
        if not (0 < self.lamb <= self.lame <= 1 and self.batches >= 0):
            raise BadParameter(f"lamb={self.lamb} and lame={self.lame} must rise within (0, 1], and batches={self.batches} be at least 0")

    def build(self, run: Run) -> "Borders":
        return Borders(self, run)

    def threshold(self, task: Task) -> float:
        """ε_t."""
        return self.lamb + (self.lame - self.lamb) * task.index / task.count


class Borders(Controller):
    """Remembers what a task used, and gives the next one a pair of its own."""

    def __init__(self, spec: BordersSpec, run: Run) -> None:
        self.spec, self.run = spec, run
        self.branches = [b for b in run.adapted.branches() if isinstance(b.delta, LowRank)]
        self.memory = {b.site.name: Memory.empty(b.site.d_in) for b in self.branches}

    def after_task(self, task: Task) -> None:
        if task.index + 1 < task.count:  # after the last nobody asks
            for name, H in self._covariances().items():
                self.memory[name] = self.memory[name].grown(H, self.spec.threshold(task))

    def before_task(self, task: Task) -> None:
        for name, H in self._covariances().items() if task.index else ():
            delta = next(b.delta for b in self.branches if b.site.name == name)
            assert isinstance(delta, LowRank)
            delta.retire()
            set_(delta.A, designed(self.memory[name], H, delta.r))
            set_(delta.B, torch.zeros_like(delta.B))

    def state_dict(self) -> dict[str, Any]:
        return {name: {"basis": memory.basis, "free": memory.free} for name, memory in self.memory.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory = {name: Memory(saved["basis"], saved["free"]) for name, saved in state.items()}

    def _covariances(self) -> dict[str, Tensor]:
        """H of the present task, by site."""
        sites = [b.site for b in self.branches]
        seen = observe(self.run.adapted.model, sites, frozenset({INPUTS}), self.run.calibration(self.spec.batches))
        return {site.name: covariance(site, seen[site.name]) for site in sites}


@method("inflora", paper="arXiv:2404.00228", survey="2.4", kind="continual learning")
def inflora(
    r: int = 10,
    alpha: float = 10.0,
    sites: Where = "kv",
    lamb: float = 0.95,
    lame: float = 1.0,
    batches: int = 64,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA for tasks in sequence: each task's B learns where no earlier task has inputs."""
    delta = LowRankSpec(Rank.of(r, alpha), train=("B",), legs=True)
    return Method(delta, FirstTask(batches), sites=sites, unfreeze=unfreeze, controllers=(BordersSpec(lamb, lame, batches),))
