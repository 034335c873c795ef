"""Init[A] versus Init[B]: which factor of LoRA starts random.

    Init[A]: A ~ N(0, 1/d_in), B = 0        Init[B]: A = 0, B ~ N(0, 1/r)        both give ΔW = 0

At the first step Init[A] has ∂A = 0, ∂B ≠ 0, and Init[B] the reverse. The paper: Init[A] tolerates larger learning rates as the width
grows and is better on average; Init[B] is more stable, but B stays under-trained.
Trained and shapes as in `lora`. Default: init A.
References: arXiv:2406.08447; survey 3.3.1 (whose section 2.1 swaps the two).

Use it when you study the start of LoRA itself, or when a run at a small rate diverges and `init=B`'s smaller rates are worth a try.
Otherwise Init[A], which is `lora` up to the distribution, is better on average by the paper's own account.
"""

from typing import Literal

from lorakit.core.method import Method, method
from lorakit.core.site import Where
from lorakit.methods.lora.lora import lora
from lorakit.parts.inits.random import OneSided


@method("init_ab", paper="arXiv:2406.08447", survey="3.3.1", kind="init")
def init_ab(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    init: Literal["A", "B"] = "A",
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA with a choice of the factor that starts random."""
    return lora(r, alpha, dropout, sites, unfreeze=unfreeze).but(init=OneSided(init))
