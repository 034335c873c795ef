"""Flora: whole weights trained by an optimizer that keeps its momentum as a random projection of r rows.

    u = G / √v̂ (Adafactor), or u = G (SGD)        û = (1 − β₁) u + β₁ · up(m)        m ← β₁ m + (1 − β₁) down(u)
    W ← W − lr · max(10⁻³, rms W) · û / max(1, rms û)        (SGD: W ← W − lr · û)

    down(G) = P G, up(C) = Pᵀ C where d_out < d_in, else G Pᵀ and C P        P: r × min(d_out, d_in), P_ij ~ N(0, 1/r)

There is no adapter: LoRA with a frozen A descends along G AᵀA, a random projection of the gradient, and Flora draws that projection anew
every κ (`kappa`) steps, m ← down_new(up_old(m)), so that the change of W has full rank. up(down(G)) is G on average but never exactly, its
relative error being about √(min(d_out, d_in) / r). P follows from `projection_seed` on the CPU and is never in a checkpoint; matrices of
one smaller dimension share a draw. Embeddings, vectors and matrices no larger than r keep their momentum whole.
With `accumulate`, gradients are compressed too between the micro-batches of a step, by a P of that step: C ← C + down(G_i), then up(C).
The memory saved is that of the gradients during a forward; within one backward they are whole, since the trainer divides, sums over
processes and clips them there. A step of one micro-batch compresses nothing.
Trained: every parameter that `unfreeze` names, by default all. Checkpoint: whole weights. State: r · max(d_out, d_in) + d_out + d_in.
Defaults: r 256, κ 1000, Adafactor with a clip of 1, decay −0.8 and steps relative to the weight (`scale_parameter`), as in the official
code; β₁ (`beta1`) 0.9, which its JAX version has and its torch version leaves unset; 0 is no momentum. `rule` "sgd" is the theory's.
References: arXiv:2402.03293; survey 3.1.2.

Use it when you want full fine-tuning and the optimizer's state or accumulated gradients are what does not fit: the momentum is a random
projection. The checkpoint is whole weights, no adapter; it follows full tuning over many small steps, and loses to LoRA over a few large
ones (log).
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lorakit.core.errors import BadParameter
from lorakit.core.events import Descent, Loop, LoopSpec, MicroBatches, Run, Step
from lorakit.core.method import Method, method
from lorakit.parts.optimizers.flora import Adafactor, Flora, Plain
from lorakit.parts.optimizers.projection import Projections, down, up


class Accumulation(Loop):
    """The gradients of a step's earlier micro-batches are held as r rows or columns while the next one runs."""

    def __init__(self, run: Run, flora: Flora) -> None:
        self.run, self.flora, self.data = run, flora, run.stream()
        self.projections = Projections(flora.r, flora.seed, "accumulation")

    def step(self, info: Step) -> tuple[float, int]:
        batches = next(self.data)
        done = self.run.gradients(batches, info) if len(batches) == 1 else self._accumulated(batches, info)
        self.run.update(info)
        return done

    def _accumulated(self, batches: MicroBatches, info: Step) -> tuple[float, int]:
        held: dict[str, Tensor] = {}
        nats, tokens = 0.0, 0
        for batch in batches:
            more, n = self.run.gradients([batch], info)
            for row in self.run.adapted.params():
                if row.tensor.grad is not None:
                    piece = n * self._down(row.tensor.grad, info)
                    held[row.name] = held[row.name].add_(piece) if row.name in held else piece
                    row.tensor.grad = None
            nats, tokens = nats + more, tokens + n
        for row in self.run.adapted.params():
            if row.name in held:
                row.tensor.grad = self._up(held.pop(row.name) / max(1, tokens), row.tensor, info)
        return nats, tokens

    def _down(self, G: Tensor, info: Step) -> Tensor:
        return down(G, self.projections.of(info.index, G)) if self.flora.compresses(G.shape) else G

    def _up(self, C: Tensor, like: Tensor, info: Step) -> Tensor:
        return up(C, self.projections.of(info.index, like), like.shape) if self.flora.compresses(like.shape) else C


@dataclass(frozen=True)
class AccumulationSpec:
    """Builds the loop of form (a)."""

    flora: Flora
    requires: frozenset[str] = frozenset()

    def build(self, run: Run) -> Loop:
        return Accumulation(run, self.flora)


@method("flora_gc", paper="arXiv:2402.03293", survey="3.1.2", kind="optimizer")
def flora_gc(
    r: int = 256,
    kappa: int = 1000,
    beta1: float = 0.9,
    rule: Literal["adafactor", "sgd"] = "adafactor",
    scale_parameter: bool = True,
    accumulate: bool = False,
    projection_seed: int = 0,
    unfreeze: tuple[str, ...] = ("*",),
) -> Method:
    """Full fine-tuning whose momentum is a random projection: no adapter, the optimizer's memory of one."""
    if not unfreeze:
        raise BadParameter("unfreeze is empty, and flora_gc has no adapter to train: unfreeze='*' is every parameter")
    rules: dict[str, Any] = {"adafactor": Adafactor(scale_parameter=scale_parameter), "sgd": Plain()}
    flora = Flora(r, beta1, kappa, rules[rule], projection_seed)
    loop: LoopSpec = AccumulationSpec(flora) if accumulate else Descent()
    return Method(None, unfreeze=unfreeze, optim=flora, loop=loop)
