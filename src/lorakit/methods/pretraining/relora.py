"""ReLoRA: full-rank training by low-rank updates, one after another.

    leg n:   y = (W + s Σ_{i<n} B_i A_i) x + s · B_n A_n dropout(x) + bias        s = alpha / r, A_n: r × d_in, B_n: d_out × r

Every `period` steps the base absorbs s·B A, A is drawn anew, B is zero, the optimizer's state of the pair is reset (or pruned: by magnitude
or at random, a share `prune` of its moments), and the learning rate starts again from zero and is back on the run's own schedule after
`warmup` steps ("jagged cosine": with lr_scheduler_type cosine). A restart leaves the function as it was. The update's rank grows to at
most legs · r.
`optimizer="reset"` drops the moments and the step count; the pruning policies and "keep" leave the count. The ramp multiplies the
schedule, where the official code aims at its value at the ramp's end; the schedule itself, with its floor, is the run's. Their trainable
scaling s = tanh(θ) is left out: it is reset together with B and then dead.
The adapter keeps every leg: it loads on the untouched base and is plain LoRA of rank Σ r. On a quantized base absorbing means quantizing
again: the error is noted at the end of the run, and `absorb=False` keeps the legs in the forward instead, exactly, at rank n·r.
Trained: A, B: r (d_in + d_out) a site. In pre-training all that is not adapted stays trainable: `unfreeze=("embed_tokens", "norm", …)`.
Defaults: r 128, alpha 32, dropout 0.1, period 1000, warm-up 100, prune 0.8 (the official 1B configuration; its policy there is
"magnitude"); the official 250M run: period 5000, "reset".
References: arXiv:2307.05695; survey 2.4, 3.1.1.

Use it when one low-rank update is not enough over a long run: in pre-training or continued pre-training, with many thousands of steps
between a few restarts. Not for ordinary fine-tuning: a run of hundreds of steps gets a large adapter (all legs are kept) and jagged
learning rates for nothing.
"""

from lorakit.core.lowrank import LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.parts.controllers.restart import Policy, Restart
from lorakit.parts.inits.random import Kaiming


@method("relora", paper="arXiv:2307.05695", survey="2.4", kind="controller")
def relora(
    r: int = 128,
    alpha: float = 32.0,
    dropout: float = 0.1,
    sites: Where = "all-linear",
    period: int = 1000,
    warmup: int = 100,
    optimizer: Policy = "reset",
    prune: float = 0.8,
    absorb: bool = True,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA merged and restarted again and again, so that the sum of the legs has a high rank."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    restart = Restart(period, warmup, optimizer, prune, absorb)
    return Method(LowRankSpec(rank, dropout, legs=True), Kaiming(), sites=sites, unfreeze=unfreeze, controllers=(restart,))
