"""rsLoRA: rank-stabilized LoRA.

    y = W x + (alpha / √r) · B A dropout(x) + bias

LoRA with another scale: with alpha / r the update's size falls as 1/√r when r grows; with alpha / √r it stays of order one.
Trained, shapes and init as in `lora`. Defaults: those of `lora`.
References: arXiv:2312.03732, theorem 3.2; beyond the survey.

Use it when r is large (64 and more) or when you compare ranks: the update keeps its size as r grows, so one learning rate serves all. At r
8 it is `lora` with alpha 2.8 times as large and nothing else; lower the rate when you switch to it.
"""

from lorakit.core.lowrank import LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.parts.inits.random import Kaiming


@method("rslora", paper="arXiv:2312.03732", survey="2.1", kind="scale")
def rslora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA scaled by alpha / √r, so that the update keeps its size as the rank grows."""
    rank = Rank.of(r, alpha, rule="sqrt", rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    return Method(LowRankSpec(rank, dropout), Kaiming(), sites=sites, unfreeze=unfreeze)
