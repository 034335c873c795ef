"""Pfeiffer adapters: one module a layer, after the feed-forward.

    h ← h + s · ( B f( A n(h) + a ) + b )        A: r × d, B: d × r; h is the feed-forward's output

Half of `adapter_houlsby`'s modules. AdapterFusion's module reads LayerNorm(h + residual) and adds to h, which only post-norm models have;
here, as in `adapter_houlsby`, it reads h itself (`norm` gives it a LayerNorm of its own).
Trained: 2 r d + r + d a layer; the model's norms stay as they are unless `train_norms`.
`scale`, `activation`, `norm`, `train_norms`, `init`, `std`, `drop_first` and `drop_random` (AdapterDrop): as in `adapter_houlsby`.
Defaults: r 48 (a reduction by 16 of BERT's 768, as AdapterHub has it) and relu (AdapterHub's configuration).
References: arXiv:2005.00247; AdapterDrop arXiv:2010.11918; survey 1.

Use it when you compare with AdapterHub's default or want half of Houlsby's cost at inference: one module a layer. It cannot be merged
either, and reaches the attention only through what comes after it.
"""

from typing import Literal

from lorakit.core.method import Method, get_method, method
from lorakit.core.site import Where
from lorakit.parts.deltas.bottleneck import Activation


@method("adapter_pfeiffer", paper="arXiv:2005.00247", survey="1", kind="module")
def adapter_pfeiffer(
    r: int = 48,
    scale: float = 1.0,
    activation: Activation = "relu",
    dropout: float = 0.0,
    sites: Where = "mlp-output",
    norm: bool = False,
    train_norms: bool = False,
    init: Literal["zero", "near"] = "zero",
    std: float = 0.01,
    drop_first: int = 0,
    drop_random: int = 0,
    rank_pattern: dict[str, int] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """A bottleneck module after the feed-forward only."""
    return get_method(
        "adapter_houlsby", r=r, scale=scale, activation=activation, dropout=dropout, sites=sites, norm=norm, train_norms=train_norms,
        init=init, std=std, drop_first=drop_first, drop_random=drop_random, rank_pattern=rank_pattern, unfreeze=unfreeze,
    )  # fmt: skip
