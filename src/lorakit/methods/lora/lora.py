"""LoRA: low-rank adaptation.

    y = W x + (alpha / r) · B A dropout(x) + bias        W: d_out × d_in frozen, A: r × d_in, B: d_out × r

Trained: A and B, r (d_in + d_out) parameters a site. A ~ U(±1/√d_in), B = 0, so the output is the base's at the start, bit for bit; at an
embedding A = 0 and B ~ N(0, 1). Merging adds s·B·A to W. Of a mixture's stacked experts each has a pair of its own: A is E × r × d_in,
B is E × d_out × r.
Defaults: r 8, alpha 16, no dropout (RoBERTa, section D.1 and the official GLUE scripts). The paper adapts Wq and Wv (`sites="qv"`);
adapting every linear layer is today's practice and the default here.
References: arXiv:2106.09685; survey 2.1.

Use it when you have no reason for another: it is the cheapest step of those that adapt a weight, merges exactly, and every tool reads it.
At larger ranks take `rslora`; where quality at the same size matters more than 25 % of the step's time try `dora`, and compare both at
their own best rates.
"""

from lorakit.core.lowrank import LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.parts.inits.random import Kaiming


@method("lora", paper="arXiv:2106.09685", survey="2.1", kind="delta")
def lora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """Low-rank adaptation: ΔW = (alpha / r) · B A with A and B trained."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    return Method(LowRankSpec(rank, dropout), Kaiming(), sites=sites, unfreeze=unfreeze)
