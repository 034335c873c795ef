"""LoRA+: LoRA with a larger learning rate for B.

    lr_B = ratio · lr_A

At large width A and B need rates that differ by a factor growing with the width; one rate for both learns features inefficiently.
Only B gets the ratio: other vectors (a DoRA magnitude, an unfrozen head) stay at the run's rate. Embedding sites train at a fixed
`embedding_lr`.
Trained, shapes, init and checkpoint as in `lora`. Defaults: ratio 16 (from memory of the paper; the official README's example has 20),
embedding_lr 1e-6 (official code).
References: arXiv:2402.12354; survey 3.3.2.

Use it when the model is wide and LoRA learns slowly at the largest stable rate: B learns `ratio` times faster at no cost. The run's rate is
A's, so choose it anew, lower than LoRA's; on a narrow model the gain is small.
"""

from lorakit.core.errors import BadParameter
from lorakit.core.method import Method, method
from lorakit.core.site import Where
from lorakit.methods.lora.lora import lora
from lorakit.parts.optimizers.adamw import AdamW


@method("loraplus", paper="arXiv:2402.12354", survey="3.3.2", kind="optimizer")
def loraplus(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    ratio: float = 16.0,
    embedding_lr: float = 1e-6,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA whose B learns `ratio` times faster than A."""
    if ratio <= 0:
        raise BadParameter(f"ratio={ratio} is not possible; lr_B = ratio · lr_A needs ratio > 0 (the paper: 16)")
    return lora(r, alpha, dropout, sites, unfreeze=unfreeze).but(optim=AdamW(ratios=(("B", ratio),), embedding_lr=embedding_lr))
