"""Compacter: adapters in low-rank hypercomplex products, whose rule all of them share.

    h ← h + s · ( B f( A h + a ) + b )        A = Σ_i (R_i ⊗ S_i T_i)ᵀ: r × d, i = 1 … n; B likewise: d × r

R_i: n × n, one rule for both projections of every module; S_i: (d/n) × ρ and T_i: ρ × (r/n) are a projection's own. h is what the
attention's and the feed-forward's output projections put out; with `plus` (Compacter++) the feed-forward's alone. `sites`, where given,
overrides both. Not mergeable, as any module in series.
Trained: 2 ρ (d + r) + r + d a site, n³ once, and with `train_norms` the model's norms. `n` must divide r and d; `rho` is ρ, `scale` s,
`activation` f. `init`: "zero" starts at T = 0 in B, so the output is the base's, bit for bit; "near" is the official start, near the
identity only. `rule_std`: of the rule's entries.
Defaults (official configurations for T5-base): n 4, ρ 1, r 24 (a reduction by 32 of 768), gelu in the tanh form, norms trained; every S_i,
T_i Xavier uniform with gain √2. rule_std 0.01 is that of unshared rules in the code; the T5 runs' shared rule had 0.0001.
Larger ones learn faster in a short run: on the built-in tkinter task, 30 steps at 1e-2 with norms frozen, 0.5 ends at 2.69, 0.01 at 3.14.
References: arXiv:2106.04647; survey 2.1.

Use it when a module baseline has to be smaller than LoRA: its factors are Kronecker products under one shared rule. With the official start
it learns slowly in short runs; `rule_std` 0.5 ended far lower in ours.
"""

from typing import Literal

from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.parts.combines.module import ModuleSpec
from lorakit.parts.deltas.bottleneck import Activation, Form
from lorakit.parts.deltas.hypercomplex import HypercomplexSpec
from lorakit.parts.inits.module import Glorot
from lorakit.parts.unfrozen.norms import Norms


@method("compacter", paper="arXiv:2106.04647", survey="2.1", kind="module")
def compacter(
    r: int = 24,
    n: int = 4,
    rho: int = 1,
    scale: float = 1.0,
    activation: Activation = "gelu_tanh",
    dropout: float = 0.0,
    plus: bool = False,
    sites: Where | None = None,
    train_norms: bool = True,
    init: Literal["zero", "near"] = "zero",
    rule_std: float = 0.01,
    rank_pattern: dict[str, int] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """Adapters whose projections are sums of Kronecker products with one shared rule."""
    form = Form(Rank.of(r, scale, rule="constant", rank_pattern=rank_pattern), activation, dropout)
    both = ("attention-output", "mlp-output")
    return Method(
        HypercomplexSpec(form, n, rho, rule_std),
        Glorot(silent=init == "zero"),
        ModuleSpec(),
        sites=sites if sites is not None else both[1:] if plus else both,
        unfreeze=(*unfreeze, Norms()) if train_norms else unfreeze,
        identity=init == "zero",
    )
