"""The bottleneck: what every adapter module computes between its input h and the change of the output.

    s · ( B f( A n(h) + a ) + b )        A: r × d, a: r, B: d_out × r, b: d_out; f nonlinear, n a LayerNorm or nothing

How A and B are made is the subclass's: dense here, Kronecker sums in `hypercomplex`. What h is, the frozen output or the block's input, is
the combine's (parts/combines/module.py); its width d is d_out but at a site that reads its own input (`BottleneckSpec.beside`).
With `drop_random` N > 0 the deltas of the first n layers are silent in a training step, n uniform on 0 … N and the same at every site
(AdapterDrop, arXiv:2010.11918): layer l < N speaks with probability (l + 1) / (N + 1), all layers judged by one draw.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec
from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site
from lorakit.ops import reference as ops
from lorakit.parts.deltas.entrances import ENTRANCES, Entrances

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
LAYERS = random.stream("layers dropped")  # one stream for all sites, so that one draw judges them all


@dataclass(frozen=True)
class Form:
    """What bottlenecks of either kind have in common; `rank` gives r and s."""

    rank: Rank
    activation: Activation = "relu"
    dropout: float = 0.0
    norm: bool = False
    drop_random: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise BadParameter(f"activation={self.activation!r} is not known. {did_you_mean(self.activation, ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise BadParameter(f"dropout={self.dropout} is not a probability; expected 0 <= dropout < 1")
        if self.drop_random < 0:
            raise BadParameter(f"drop_random={self.drop_random} is not a number of layers; 0 drops none")

    def silence(self, site: Site) -> float:
        """The probability that the site's layer is silent in a training step."""
        if site.layer is None or site.layer >= self.drop_random:
            return 0.0
        return 1 - (site.layer + 1) / (self.drop_random + 1)

    def count(self, site: Site, width: int) -> int:
        """Biases and the norm."""
        r, _ = self.rank.at(site)
        return r + site.d_out + 2 * width * self.norm


class Bottleneck(Delta, ABC):
    """One site's module. `a`, `b` and the norm stand here, A and B in the subclass."""

    linear = False
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(self, site: Site, form: Form, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.r, self.s = form.rank.at(site)
        self.activation, self.width = form.activation, width
        self.p, self.stream, self.silence = form.dropout, random.stream(site.name), form.silence(site)
        self.draws = self.p > 0 or self.silence > 0

        def vector(size: int, value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((size,), value, dtype=dtype, device=device))

        self.a, self.b = vector(self.r, 0.0), vector(site.d_out, 0.0)
        self.register_parameter("norm_weight", vector(width, 1.0) if form.norm else None)
        self.register_parameter("norm_bias", vector(width, 0.0) if form.norm else None)

    @property
    def trains(self) -> frozenset[str]:  # type: ignore[override]
        """Every tensor that it owns."""
        return frozenset(name for name, _ in self.named_parameters(recurse=False))

    @abstractmethod
    def down(self, h: Tensor, bias: Tensor) -> Tensor:
        """A h + bias: [.., d] -> [.., r]."""

    @abstractmethod
    def up(self, z: Tensor, bias: Tensor) -> Tensor:
        """B z + bias: [.., r] -> [.., d_out]."""

    def drop(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Dropout on the module's input; ids cannot be dropped."""
        if self.p == 0 or not self.training or not x.is_floating_point():
            return x
        return random.dropout(x, ctx.key, self.stream, self.p)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else self.b.dtype
        z = ACTIVATIONS[self.activation](self.down(self.normed(x), self.a.to(dtype)))
        change = self.up(z * self.s, self.b.to(dtype) * self.s)
        return change * self.speaks(change, ctx) if self.training and self.silence else change

    def normed(self, h: Tensor) -> Tensor:
        """n(h), computed at least in the norm's own precision."""
        if self.norm_weight is None or self.norm_bias is None:
            return h
        wide = h.to(torch.promote_types(h.dtype, self.norm_weight.dtype))
        return F.layer_norm(wide, (self.width,), self.norm_weight, self.norm_bias).to(h.dtype)

    def speaks(self, like: Tensor, ctx: Ctx) -> Tensor:
        """1, or 0 in a step whose draw silences the layer: [1]. Thresholds on one draw, so a silent layer's predecessors are silent too."""
        drawn = random.dropout_mask(torch.ones(1, dtype=like.dtype, device=like.device), ctx.key, LAYERS, self.silence)
        return (drawn > 0).to(like.dtype)


class DenseBottleneck(Bottleneck):
    """A [r, d] and B [d_out, r] themselves."""

    provides = frozenset({"module", "dense module"})

    def __init__(self, site: Site, form: Form, width: int, reads: tuple[str, ...], *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site, form, width, dtype=dtype, device=device)
        self.reads = reads
        self.A = nn.Parameter(torch.zeros(self.r, width, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(site.d_out, self.r, dtype=dtype, device=device))

    def down(self, h: Tensor, bias: Tensor) -> Tensor:
        return F.linear(h, self.A.to(bias.dtype), bias) if h.is_floating_point() else ops.project(h, self.A) + bias

    def up(self, z: Tensor, bias: Tensor) -> Tensor:
        return F.linear(z, self.B.to(bias.dtype), bias)


@dataclass(frozen=True)
class BottleneckSpec(DeltaSpec):
    """Dense bottlenecks. `beside`: on the block's input instead of the frozen output."""

    form: Form
    beside: bool = False

    @property
    def provides(self) -> frozenset[str]:
        return DenseBottleneck.provides

    @property
    def linear(self) -> bool:
        return False

    def width(self, site: Site) -> int:
        """d at a site: the residual stream's width, or the input's where the site reads its own."""
        return site.d_in if self.beside and site.role not in ENTRANCES else site.d_out

    def pool(
        self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Entrances | None:
        return Entrances.find(sites, every) if self.beside else None

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> DenseBottleneck:
        reads = pool.of(site) if isinstance(pool, Entrances) else ()
        return DenseBottleneck(site, self.form, self.width(site), reads, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.form.rank.check(sites)
        for site in sites:
            if self.form.norm and self.beside and site.kind == "embedding":
                raise BadParameter(f"norm=True normalizes the module's input, and site {site.name!r} reads ids; leave it out of the sites")

    def count(self, site: Site) -> int:
        r, _ = self.form.rank.at(site)
        return r * (self.width(site) + site.d_out) + self.form.count(site, self.width(site))
