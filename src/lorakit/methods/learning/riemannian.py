"""Riemannian preconditioned LoRA: scaled gradient descent for the pair (A, B).

    g_A ← (BᵀB + reg·I)⁻¹ g_A        g_B ← g_B (AAᵀ + reg·I)⁻¹        A: r × d_in, B: d_out × r

and then AdamW or SGD (`rule`) on these gradients; the moments are those of preconditioned gradients. Under SGD the change of ΔW is, to
first order, −lr · s² (P_B G + G P_A), with P_B, P_A the projections on the column space of B and the row space of A and G the full
gradient: it does not depend on how ΔW is split into B and A, where plain descent's does, and slow directions of a badly conditioned pair
learn as fast as the others.
s is not divided out (nor in the official code, nor in PEFT): SGD's effective rate goes with s², AdamW's does not. Both inverses are of the
factors before the step; the official code updates A first and then uses the new A for B. Gradients are clipped before they are
preconditioned. Parameters in no pair (a magnitude, a gate, a head) keep the plain rule. Embedding sites are preconditioned like all others,
which PEFT leaves out.
Trained, shapes, init and checkpoint as in `lora`.
Defaults: AdamW; reg 1e-6 (official code; PEFT's `create_riemannian_optimizer` has 1e-2). With SGD take a larger reg: at step 1 B is tiny
and its inverse as large as 1/reg.
References: arXiv:2402.02347; survey 3.3.2.

Use it when you train with plain SGD, or the pair is badly conditioned: there the preconditioner makes slow directions as fast as others.
With AdamW we saw no gain: over 30 steps on the built-in chat task its held-out loss was above LoRA's at every rate tried (log).
"""

from typing import Literal

from lorakit.core.method import Method, method
from lorakit.core.site import Where
from lorakit.methods.lora.lora import lora
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.parts.optimizers.riemannian import Riemannian
from lorakit.parts.optimizers.sgd import SGD

RULES: dict[str, AdamW | SGD] = {"adamw": AdamW(), "sgd": SGD()}


@method("riemannian", paper="arXiv:2402.02347", survey="3.3.2", kind="optimizer")
def riemannian(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    reg: float = 1e-6,
    rule: Literal["adamw", "sgd"] = "adamw",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA whose gradients are preconditioned by r × r matrices of the other factor."""
    method = lora(r, alpha, dropout, sites, rank_pattern, alpha_pattern, unfreeze)
    return method.but(optim=Riemannian(RULES[rule], reg))
