"""SoRA: sparse low-rank adaptation.

    y = W x + s · B (g ∘ A x) + bias                      g: r, trained
    g ← T_ξ(g), T_ξ(x) = sign(x) · max(|x| − ξ, 0)        after every step of the optimizer

The proximal step of ξ‖g‖₁: a gate that the loss does not hold up against ξ a step becomes exactly 0, and its row of A and column of B fall
away in what is exported. A gate at 0 has a gradient and may come back, until the learning rate is too small for it.
ξ is `xi`, reached in `stages` equal parts of the run: stage k of n has ξ · k / (n − 1), so the first of several has none (algorithm 1; the
paper keeps an adapter of each, here that is a run per ξ). With `per_rate` it is multiplied by the step's learning rate, the proximal step
proper of a penalty ξ‖g‖₁ and the paper's form (from memory); the official code's is not, and its three in-place lines also set whatever
lies in (ξ, 2ξ) to 0, which is no soft threshold. There is no second L1 in the loss.
Trained: A, B, g: r (d_in + d_out + 1) a site. A as in `lora`, B = 0, g ~ N(0, 1). No weight decay on g. Exported: plain LoRA, the zero
gates dropped and the others folded into A.
Defaults: r 8, alpha 16, xi 3e-4, one stage (official code; its schedule script has 7 values up to 7e-4).
References: arXiv:2311.11696; survey 3.2.2.

Use it when the rank should come out of training and sparsity is welcome: gates that the loss does not hold up become exactly zero and their
rows are not exported. It needs a run long enough for ξ times the steps to outweigh a useful gate's pull; in a short one hardly anything is
pruned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter
from lorakit.core.events import Controller, Run, Step
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import Kaiming, normal, set_
from lorakit.parts.optimizers.adamw import AdamW


@dataclass(frozen=True)
class OpenGates:
    """LoRA's start, and g ~ N(0, 1)."""

    requires: frozenset[str] = frozenset({"factors", "gate"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        Kaiming()(delta, base, site, rng)
        set_(delta.g, normal(delta.g, 1.0, rng))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ThresholdSpec:
    """ξ, its stages, and whether it goes with the learning rate."""

    xi: float
    stages: int
    per_rate: bool
    requires: frozenset[str] = frozenset({"gate"})

    def __post_init__(self) -> None:
        if self.xi < 0 or self.stages < 1:
            raise BadParameter(f"xi={self.xi} must be at least 0 and stages={self.stages} at least 1")

    def build(self, run: Run) -> "Threshold":
        return Threshold(self, run)

    def at(self, step: Step) -> float:
        """ξ of a step."""
        stage = step.index * self.stages // step.total
        return self.xi * stage / (self.stages - 1) if self.stages > 1 else self.xi


class Threshold(Controller):
    """The proximal step on every gate."""

    def __init__(self, spec: ThresholdSpec, run: Run) -> None:
        self.spec, self.run = spec, run

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        rates = {id(p): group["lr"] for group in self.run.optimizer.param_groups for p in group["params"]} if self.spec.per_rate else {}
        for branch in self.run.adapted.branches():
            if isinstance(branch.delta, LowRank) and branch.delta.g is not None:
                gate = branch.delta.g
                gate.copy_(soft_threshold(gate, self.spec.at(step) * rates.get(id(gate), 1.0)))


def soft_threshold(x: Tensor, xi: float) -> Tensor:
    """sign(x) · max(|x| − ξ, 0), element by element."""
    return x.sign() * (x.abs() - xi).clamp_min(0)


@method("sora", paper="arXiv:2311.11696", survey="3.2.2", kind="controller")
def sora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    xi: float = 3e-4,
    stages: int = 1,
    per_rate: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA with a gate on every rank, made sparse by a soft threshold after each step."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    spec = LowRankSpec(rank, dropout, train=("A", "B", "g"), gate=True)
    parts = {"controllers": (ThresholdSpec(xi, stages, per_rate),), "optim": AdamW(undecayed=("g",))}
    return Method(spec, OpenGates(), sites=sites, unfreeze=unfreeze, **parts)  # type: ignore[arg-type]
