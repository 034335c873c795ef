"""LoRA with prefix tuning: low-rank updates and trained positions together.

    y = W x + (alpha / r) · B A x        beside        attention(q, [K_l; k], [V_l; v])   or   h₀ = [P; E(x)]

The LoRA paper's LoRA+PE (`form` "embedding", which beats LoRA alone on WikiSQL there) and LoRA+PL ("layer"). Both parts are those of
`lora` and `prefix`, with their parameters: `tokens`, `form`, `start`, `std` and `ratio` are explained there.
Trained: A, B and the prefix. Never merged as a whole: the trained positions stay beside the weights.
Defaults: those of `lora`, and of `prefix` but for the form, as the paper finds only PreEmbed to add to LoRA.
References: arXiv:2106.09685, section 5.1 and appendix E; survey 1.

Use it when you reproduce the LoRA paper's combinations, or a LoRA seems to lack an instruction that a few trained positions could carry.
The result cannot be merged as a whole, which gives up LoRA's main comfort.
"""

from typing import Literal

from lorakit.core.method import Method, get_method, method
from lorakit.core.site import Where
from lorakit.parts.patches.prompt import Start


@method("lora_prefix", paper="arXiv:2106.09685", survey="1", kind="composition")
def lora_prefix(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    tokens: int = 20,
    form: Literal["layer", "embedding"] = "embedding",
    start: Start = "words",
    std: float = 0.02,
    ratio: float = 100.0,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA and a trained prefix."""
    lora = get_method("lora", r=r, alpha=alpha, dropout=dropout, sites=sites, unfreeze=unfreeze)
    prefix = get_method("prefix", tokens=tokens, form=form, start=start, std=std, ratio=ratio)
    return lora.but(patches=prefix.patches, optim=prefix.optim, identity=False)
