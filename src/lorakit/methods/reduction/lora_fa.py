"""LoRA-FA: LoRA with A frozen at its random start.

    y = W x + s · B (A x)        A: r × d_in random and frozen, B: d_out × r trained from zero

Backward needs A x (r wide), never x (d_in wide), so the adapter keeps r values a token instead of d_in. ΔW's rows stay in the row
space of A.
With `correct` B's gradient becomes g_B (A Aᵀ)⁻¹ / s², the minimizer of ‖s g_B A − g‖_F, so that s·g_B·A is the full gradient g
projected on the row space of A (version 2 of the paper; eps 1e-6 for Adam as the correction rescales gradients). Dropout keeps a mask of
x's size and spoils the saving: it is 0 and not offered. At an embedding A ~ N(0, 1) and B = 0: LoRA's own start there, A = 0, would never
learn.
Trained: B, r d_out parameters a site. Checkpoint: a plain LoRA pair.
References: arXiv:2308.03303; survey 5.1.1. Version 1's equations are stated from memory.

Use it when activations, not parameters, fill the memory: A's inputs are not kept, and a step keeps what the frozen model keeps. What it can
learn lies in the row space of a random A, so give it a larger r than LoRA; dropout would undo the saving.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lorakit.core.attach import Adapted
from lorakit.core.events import Controller, Run, Step
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import MIXTURES, Kind, Where
from lorakit.parts.inits.random import Kaiming
from lorakit.parts.optimizers.adamw import AdamW


class Correction(Controller):
    """Replaces B's gradient, before clipping, by the one that best imitates the full gradient; all in fp32."""

    def __init__(self, adapted: Adapted) -> None:
        self.adapted = adapted

    def after_backward(self, step: Step) -> None:
        for param in self.adapted.params().by_role("B"):
            delta, grad = param.module, param.tensor.grad
            if isinstance(delta, LowRank) and grad is not None:
                grad.copy_(corrected(grad, delta.A.detach(), delta.s))


def corrected(grad: torch.Tensor, A: torch.Tensor, s: float) -> torch.Tensor:
    """g_B (A Aᵀ)⁻¹ / s² for g_B [.., d_out, r], A [.., r, d_in]; a tiny ridge keeps a rank-deficient A solvable."""
    gram = A @ A.mT
    ridge = 1e-8 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, grad, left=False) / s**2  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CorrectionSpec:
    """Builds the gradient correction of a run."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    requires: frozenset[str] = frozenset({"factors"})

    def build(self, run: Run) -> Controller:
        return Correction(run.adapted)


@method("lora_fa", paper="arXiv:2308.03303", survey="5.1.1", kind="frozen factor")
def lora_fa(
    r: int = 8,
    alpha: float = 16.0,
    sites: Where = "all-linear",
    correct: bool = False,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA with A frozen: half the parameters, and activations r wide instead of d_in."""
    parts: dict[str, Any] = {"controllers": (CorrectionSpec(),), "optim": AdamW(eps=1e-6)} if correct else {}
    spec = LowRankSpec(Rank.of(r, alpha), train=("B",))
    return Method(spec, Kaiming(embedding="A"), sites=sites, unfreeze=unfreeze, **parts)
