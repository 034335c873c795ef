"""Houlsby adapters: a small nonlinear module after each sublayer.

    h ← h + s · ( B f( A n(h) + a ) + b )        A: r × d, a: r, B: d × r, b: d

h is what the attention's and the feed-forward's output projections put out, before the residual is added; f is `activation`, n a LayerNorm
of the module's own with `norm`, s is `scale`. The module adds depth: it is not merged, and costs time at inference.
Trained: 2 r d + r + d a site (and 2 d with `norm`), and with `train_norms` the model's own norms, as the paper does.
`init`: "zero" starts at B = 0 and A ~ U(±1/√d), so the output is the base's, bit for bit; "near" draws both from N(0, `std`²) truncated at
two std: the paper's nearly-identity.
`parallel`: the module reads the block's input instead (`mam_parallel`).
AdapterDrop: `drop_first` n leaves the first n layers without modules, for good; `drop_random` N trains one adapter for any such n: in each
step the first n layers are silent, n uniform on 0 … N. `lorakit.adapters.drop.without_first` then takes layers off a finished adapter.
Defaults: r 64, gelu in the tanh form (official code); std 0.01 (the paper, from memory; the code has 0.001). The trained norms and
AdapterDrop's uniform n are from memory, too.
References: arXiv:1902.00751; AdapterDrop arXiv:2010.11918; the LoRA paper's Adapter^H, arXiv:2106.09685 section 5.1; survey 1.

Use it when a baseline is asked for that is not low-rank: the classic modules in series, with a nonlinearity. They cannot be merged, so each
token pays at inference; `drop_first` takes back a part of that.
"""

from typing import Literal

from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Beyond, Where
from lorakit.parts.combines.module import ModuleSpec
from lorakit.parts.deltas.bottleneck import Activation, BottleneckSpec, Form
from lorakit.parts.inits.module import Near, Silent
from lorakit.parts.unfrozen.norms import Norms


@method("adapter_houlsby", paper="arXiv:1902.00751", survey="1", kind="module")
def adapter_houlsby(
    r: int = 64,
    scale: float = 1.0,
    activation: Activation = "gelu_tanh",
    dropout: float = 0.0,
    sites: Where = ("attention-output", "mlp-output"),
    parallel: bool = False,
    norm: bool = False,
    train_norms: bool = True,
    init: Literal["zero", "near"] = "zero",
    std: float = 0.01,
    drop_first: int = 0,
    drop_random: int = 0,
    rank_pattern: dict[str, int] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """A bottleneck module after attention and after the feed-forward, with the model's norms trained."""
    form = Form(Rank.of(r, scale, rule="constant", rank_pattern=rank_pattern), activation, dropout, norm, drop_random)
    return Method(
        BottleneckSpec(form, parallel),
        Silent() if init == "zero" else Near(std),
        ModuleSpec(parallel),
        sites=Beyond(sites, drop_first) if drop_first else sites,
        unfreeze=(*unfreeze, Norms()) if train_norms else unfreeze,
        identity=init == "zero",
    )
