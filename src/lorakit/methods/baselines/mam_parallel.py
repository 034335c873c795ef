"""The scaled parallel adapter of the unified view ("mix-and-match"): a module beside the feed-forward.

    y = FFN(x) + s · ( B f( A x + a ) + b )        x: the feed-forward's input, A: r × d, B: d × r

Beside, not after: the module sees what the block sees, as LoRA's A x does, and changes what the block puts out, as serial adapters do.
With `sites=["attention-output", "mlp-output"]` the attention has one as well. x is what the block's first projection reads: in a pre-norm
model the normed hidden state.
The paper's MAM adapter is this module and `prefix` at the attention: `prefix=30` has both, prefix 0 the module alone, which starts at the
base's own output.
Trained: 2 r d + r + d a site, and the prefix. A ~ U(±1/√d), B = 0 (the paper's "lora" init).
`scale` s, `activation` f, `norm` (a LayerNorm of the module's own), `train_norms` (train the model's), `drop_first`, `drop_random`: as in
`adapter_houlsby`.
Defaults: s 4 and relu (official XSum run; AdapterHub). There r is 512 of a width of 1024, and 16 with s 2 on GLUE; r 64 here.
References: arXiv:2110.04366, table 1 and section 4.6; survey 1.

Use it when a baseline of modules should be as strong as modules get: beside the feed-forward, scaled, by its paper better than any in
series at the same size. Like all modules it stays in the forward for good.
"""

from lorakit.core.method import Method, get_method, method
from lorakit.core.site import Where
from lorakit.parts.deltas.bottleneck import Activation


@method("mam_parallel", paper="arXiv:2110.04366", survey="1", kind="module")
def mam_parallel(
    r: int = 64,
    scale: float = 4.0,
    activation: Activation = "relu",
    dropout: float = 0.0,
    sites: Where = "mlp-output",
    prefix: int = 0,
    norm: bool = False,
    train_norms: bool = False,
    drop_first: int = 0,
    drop_random: int = 0,
    rank_pattern: dict[str, int] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """A scaled bottleneck module beside the feed-forward, and, if asked, a prefix at the attention."""
    module = get_method(
        "adapter_houlsby", r=r, scale=scale, activation=activation, dropout=dropout, sites=sites, parallel=True, norm=norm,
        train_norms=train_norms, drop_first=drop_first, drop_random=drop_random, rank_pattern=rank_pattern, unfreeze=unfreeze,
    )  # fmt: skip
    if prefix == 0:
        return module
    return module.but(patches=get_method("prefix", tokens=prefix).patches, identity=False)
