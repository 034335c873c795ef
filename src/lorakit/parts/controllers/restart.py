"""The restart engine of everything that stacks adapters along time: every so many steps the live pair retires behind the earlier legs, the
base absorbs it, a new pair starts, the optimizer forgets, and the rate warms up again.

    leg n:   ΔW_n = s B_n A_n        W + Σ ΔW_n is what the next leg trains on        rank(Σ) <= legs · r

The legs stay in the adapter, which loads on the untouched base and is plain LoRA of rank Σ r_n. `absorb` off leaves them in the forward, at
rank n·r, for a base that could not hold them exactly; what its storage loses is noted at the end. A sharded base never absorbs.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lorakit.core import random
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.events import Assembled, Calibrated, Controller, Run, Step
from lorakit.core.layer import Branch
from lorakit.core.lowrank import LowRank

Policy = Literal["reset", "keep", "magnitude", "random"]
TINY = 1e-3
"""A relative error of the base's storage below this is fp32 rounding, and no news."""


@dataclass(frozen=True)
class Restart:
    """Every `period` steps; `warmup` steps of linear re-warming; `optimizer`: what becomes of the pair's optimizer state;
    `prune`: the share of it that the pruning policies set to zero."""

    period: int
    warmup: int
    optimizer: Policy = "reset"
    prune: float = 0.9
    absorb: bool = True
    requires: frozenset[str] = frozenset({"legs"})

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 <= self.warmup < self.period:
            raise BadParameter(f"period={self.period} must be at least 1, and the warm-up of {self.warmup} steps shorter")
        if not 0 <= self.prune <= 1:
            raise BadParameter(f"prune={self.prune} is not a share; expected 0 <= prune <= 1")

    def build(self, run: Run) -> Controller:
        (name,) = run.adapted.active
        if run.adapted.methods[name].combine.full_rank():
            raise Incompatible("a restart moves s·B·A into the weight, and this method rescales the weight: its legs would not add up")
        if run.adapted.methods[name].init is None:
            raise Incompatible("every leg of a restart starts anew, and this method has no start of its own")
        if isinstance(run.adapted.methods[name].init, Calibrated | Assembled):
            raise Incompatible("every leg of a restart starts anew, and this method's start is made once, before the run; use another init")
        return _Restart(self, run)


class _Restart(Controller):
    def __init__(self, spec: Restart, run: Run) -> None:
        self.spec, self.run, self.legs = spec, run, 0

    def before_forward(self, step: Step) -> None:
        if step.index == self.spec.period * (self.legs + 1):
            self.legs += 1
            for branch in self._branches():
                self._new_leg(branch)
        if self.spec.absorb:  # after a resume or a look at the bare base, all legs again
            for branch in [b for b in self._branches() if _can_absorb(b)]:
                branch.delta.absorb_(branch.base)  # type: ignore[operator]

    def rate(self, step: Step) -> float:
        since = step.index - self.spec.period * self.legs
        return min(1.0, since / self.spec.warmup) if self.legs and self.spec.warmup else 1.0

    @torch.no_grad()
    def finish(self) -> None:
        hosts: dict[int, list[Branch]] = {}
        for branch in self._branches():
            hosts.setdefault(id(branch.host), []).append(branch)
        lost = max((_lost(branches) for branches in hosts.values()), default=0.0)
        if lost > TINY:
            self.run.adapted.notes.append(
                f"in training the base's storage held {self.legs} legs with a relative error of {lost:.1e}; the adapter has them exactly"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"legs": self.legs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.legs = state["legs"]

    def _branches(self) -> list[Branch]:
        return [b for b in self.run.adapted.branches() if isinstance(b.delta, LowRank)]

    def _new_leg(self, branch: Branch) -> None:
        (name,) = self.run.adapted.active
        delta, init = branch.delta, self.run.adapted.methods[name].init
        assert isinstance(delta, LowRank) and init is not None and not isinstance(init, Calibrated | Assembled)
        delta.retire()
        with torch.no_grad():
            for tensor in (delta.A, delta.B):
                tensor.zero_()
        init(delta, branch.base, branch.site, random.generator(self.run.adapted.seed, f"{branch.site.name}:leg{self.legs}"))
        for tensor in (delta.A, delta.B, *([] if delta.g is None else [delta.g])):
            self._forget(tensor, random.generator(self.run.adapted.seed, f"{branch.site.name}:forget{self.legs}"))

    def _forget(self, tensor: Tensor, rng: torch.Generator) -> None:
        """Drop the tensor's optimizer state, step count included, or prune its moments and keep the count."""
        if self.spec.optimizer == "reset":
            self.run.optimizer.state.pop(tensor, None)
        elif self.spec.optimizer != "keep":
            for moment in self.run.optimizer.state.get(tensor, {}).values():
                if isinstance(moment, Tensor) and moment.shape == tensor.shape:
                    moment.mul_(_kept(moment, self.spec, rng))


def _lost(branches: list[Branch]) -> float:
    """The largest ‖what the base holds − W − Σ ΔW_n‖ / ‖Σ ΔW_n‖ over the sites of one module (the parts of a fused weight have one base),
    which is given its bits back."""
    absorbed = [b for b in branches if b.delta.absorbed]
    held = [b.base.dense(torch.float32) for b in absorbed]
    for branch in absorbed:
        branch.expel()
    lost = 0.0
    for branch, before in zip(absorbed, held, strict=True):
        delta = branch.delta
        assert isinstance(delta, LowRank) and delta.A0 is not None and delta.B0 is not None
        legs = -delta.s * (delta.B0 @ delta.A0)
        lost = max(lost, float((before - branch.base.dense(torch.float32) - legs).norm() / legs.norm().clamp_min(1e-30)))
    return lost


def _can_absorb(branch: Branch) -> bool:
    """Not at another size than 1, which the base could not hold, and not into a weight of which this process has a part only (FSDP2)."""
    return branch.w == 1.0 and not isinstance(getattr(branch.base.module, branch.site.attribute), DTensor)


def _kept(moment: Tensor, spec: Restart, rng: torch.Generator) -> Tensor:
    """A mask that is zero for at least the share `prune` of the entries: the smallest ones, or random ones."""
    size = torch.rand(moment.shape, generator=rng).to(moment.device) if spec.optimizer == "random" else moment.abs()
    n = -int(-spec.prune * moment.numel() // 1)
    order = size.flatten().argsort()
    mask = torch.ones_like(moment).flatten()
    mask[order[:n]] = 0
    return mask.view_as(moment)
