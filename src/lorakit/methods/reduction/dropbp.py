"""DropBP: in each step the backward pass skips some attention and MLP sublayers.

    x + f(x)  →  x + stop_gradient(f(x))        with probability p_l in training, sublayer l; no rescaling, the forward keeps its bits

Each step draws its set once: Bernoulli(p_l), then topped up, highest p_l first, until at least `p_target` of the FLOPs is dropped. It is a
pure function of (seed, step), the same for all micro-batches and processes. A dropped adapter has no gradient and the optimizer passes
over it. A step that dropped everything updates nothing; the first one drops nothing, so that the run can check there that every adapter is
reached.
At 10 % of the run one batch measures S_l = Σ_params (‖g‖₂ − ‖g without l‖₂)². From p = 0 on, the sublayer with the smallest S_l · p gets
0.1 more, up to 0.9, again and again, until Σ FLOPs_l (1 − p_l) ≤ (1 − p_target) Σ FLOPs_l; before, p_l = p_target. `sensitivity=False`
keeps it so.
FLOPs of a token: 2 for each weight, and 4 d · `length` in attention, for texts of that many tokens (8 d² + 4 d · length and 16 d² in the
paper).
Trained: LoRA's A and B. Checkpoint: plain LoRA. Other methods have it by name: `dora+dropbp`.
Time is what it saves: the first step and the measure keep all activations, so that the peak of memory is LoRA's. A compiled model has one
graph for each set that it meets: leave compilation off.
Defaults: `p_target` 0.5 (official code); `length` 512 ours. References: arXiv:2402.17812; survey 5.1.1.

Use it when time is short and the model deep: half of the backward's sublayers are skipped, the forward stays exact. Memory's peak stays
LoRA's, compilation is off the table, and what a skipped sublayer would have learned takes more steps.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.core import random
from lorakit.core.errors import BadParameter
from lorakit.core.events import Controller, MicroBatches, Run, Step
from lorakit.core.method import Method, get_method, method
from lorakit.core.site import MIXTURES, Kind, Where
from lorakit.parts.patches.stopped import Stopped, StoppedSpec

GRID, HIGHEST = 10, 9  # p moves in tenths, up to nine, so that every sublayer goes on learning
MEASURED = 0.1  # of the run


def allocated(sensitivity: Sequence[float], flops: Sequence[float], p_target: float) -> list[float]:
    """p_l, in tenths: greedily the cheapest S_l · p first, until p_target of the FLOPs is dropped on average."""
    tenths, left, aim = [0] * len(flops), sum(flops), (1 - p_target) * sum(flops)
    highest = HIGHEST if p_target <= HIGHEST / GRID else GRID
    queue = [(s / GRID, i) for i, s in enumerate(sensitivity)]
    heapq.heapify(queue)
    while left > aim + 1e-9 * sum(flops):
        _, i = heapq.heappop(queue)
        tenths[i] += 1
        left -= flops[i] / GRID
        if tenths[i] < highest:
            heapq.heappush(queue, (sensitivity[i] * (tenths[i] + 1) / GRID, i))
    return [t / GRID for t in tenths]


def drawn(rates: Tensor, flops: Tensor, p_target: float, rng: torch.Generator) -> Tensor:
    """bool [sublayers]: a Bernoulli set, topped up to p_target of the FLOPs, highest rate first; among equal rates chance decides."""
    u = torch.rand(len(rates), dtype=torch.float64, generator=rng)
    which = u < rates
    for i in sorted(range(len(rates)), key=lambda i: (-float(rates[i]), float(u[i]))):
        if float(flops[which].sum()) >= p_target * float(flops.sum()) * (1 - 1e-9):
            break
        which[i] = True
    return which


class Drop(Controller):
    """Draws each step's set, and once measures what each sublayer's backward is worth."""

    def __init__(self, run: Run, spec: "DropSpec", patch: Stopped) -> None:
        self.run, self.spec, self.patch = run, spec, patch
        active = getattr(run.adapted.model.config, "num_experts_per_tok", None) or 1
        self.flops = torch.tensor([s.flops(spec.length, active) for s in patch.sublayers], dtype=torch.float64)
        self.rates = torch.full_like(self.flops, spec.p_target)
        self.data = run.stream() if spec.sensitivity else None

    def before_forward(self, step: Step) -> None:
        if step.index == max(1, round(MEASURED * step.total)) and self.data is not None:
            worth = self._worth(next(self.data), step)
            self.rates = torch.tensor(allocated(worth, self.flops.tolist(), self.spec.p_target), dtype=torch.float64)
        rng = random.generator(self.run.adapted.seed, f"dropbp {step.index}")
        which = drawn(self.rates, self.flops, self.spec.p_target, rng)
        self.patch.stop([bool(w) and step.index > 0 for w in which])

    def _worth(self, batches: MicroBatches, step: Step) -> list[float]:
        """S_l of every sublayer, on one batch."""
        n = len(self.flops)
        whole = self._norms(batches, step, None)
        return [float((whole - self._norms(batches, step, i)).square().sum()) for i in range(n)]

    def _norms(self, batches: MicroBatches, step: Step, without: int | None) -> Tensor:
        """‖g‖₂ of every parameter, with one sublayer stopped or none."""
        self.patch.stop([i == without for i in range(len(self.flops))])
        self.run.gradients(batches, step)
        norms = []
        for row in self.run.adapted.params():
            norms.append(0.0 if row.tensor.grad is None else float(row.tensor.grad.double().norm()))
            row.tensor.grad = None
        return torch.tensor(norms, dtype=torch.float64)

    def finish(self) -> None:
        self.patch.stop([False] * len(self.flops))

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates = state["rates"]


@dataclass(frozen=True)
class DropSpec:
    """How much of the backward pass is dropped, and whether by sensitivity."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    p_target: float
    length: int = 512
    sensitivity: bool = True
    requires: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.p_target <= 1 or self.length < 1:
            raise BadParameter(f"p_target={self.p_target} must lie in [0, 1], length={self.length} must be at least 1")

    def build(self, run: Run) -> Drop:
        (name,) = run.adapted.active
        (patch,) = [part for part in run.adapted.shared(name).values() if isinstance(part, Stopped)]
        return Drop(run, self, patch)


@method("dropbp", paper="arXiv:2402.17812", survey="5.1.1", kind="patch + controller")
def dropbp(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    p_target: float = 0.5,
    length: int = 512,
    sensitivity: bool = True,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA whose backward pass skips a random half of the sublayers."""
    lora = get_method("lora", r=r, alpha=alpha, dropout=dropout, sites=sites, unfreeze=unfreeze)
    return lora.but(patches=(StoppedSpec(),), controllers=(DropSpec(p_target, length, sensitivity),))
