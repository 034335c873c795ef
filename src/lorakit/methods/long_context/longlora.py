"""LongLoRA: LoRA on the attention, trained embeddings and norms, and attention within shifted groups while training.

    y = W x + (alpha / r) · B A x        q, k, v, o; embeddings and norms whole (`whole`)
    training: half of the heads attend in groups [k g, (k + 1) g), the others in groups shifted by g / 2; g: `group`, or a quarter
    eval: full attention, bit for bit the model's own

No token sees a later one: the shifted heads' first group is g / 2 long, as in the authors' flash-attention path. Their eager path rolls
the text instead, and its last group lets early tokens see late ones; `wrap=True` computes that, for comparison with released checkpoints
only. `context` > the base's own length squeezes the rotary positions by ⌈context / length⌉ (position interpolation), in inference too. An
untied copy of a tied embedding is trained; the head stays.
Trained: A and B, r (d_in + d_out) a site, and every embedding and norm. Checkpoint: LoRA beside whole tensors. Merges, unless `context` is
set.
Defaults: r 8, alpha 16, `group` 0 = a quarter (official code); `context` 0, the base's own. Learning rate 2e-5, constant after 20 warm-up
steps.
References: arXiv:2309.12307; survey 2.4.

Use it when the texts are longer than the base was trained on and attention in full does not fit while training. For texts within the base's
length it only adds trained embeddings and norms, and makes training attend to less than the model will see later.
"""

from lorakit.core.method import Method, get_method, method
from lorakit.core.site import Where
from lorakit.parts.patches.interpolated import InterpolatedSpec
from lorakit.parts.patches.shifted import ShiftedSpec
from lorakit.parts.unfrozen.embeddings import Embeddings
from lorakit.parts.unfrozen.norms import Norms


@method("longlora", paper="arXiv:2309.12307", survey="2.4", kind="patch")
def longlora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "attention",
    group: int = 0,
    wrap: bool = False,
    context: int = 0,
    whole: bool = True,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA with trained embeddings and norms, trained under shifted sparse attention."""
    lora = get_method("lora", r=r, alpha=alpha, dropout=dropout, sites=sites)
    longer = (InterpolatedSpec(context),) if context else ()
    trained = (*unfreeze, Embeddings(), Norms()) if whole else unfreeze
    return lora.but(patches=(ShiftedSpec(group, wrap), *longer), unfreeze=trained)
