"""BitFit: biases only.

    y = W x + bias + b        b: d_out, trained from 0

A site whose module has a bias trains that bias (b is its change, and merging adds it). A site without one, as all of Llama's, gets b as a
bias of its own, which a plain model of that architecture cannot hold, so merging is refused there. With `train_norms` the biases of the
model's norms are trained too, where there are any.
Trained: d_out values a site, and the norms' biases. A bias of the keys does nothing where positions are not rotary: softmax is blind to it.
Defaults: every linear layer and the norms (the paper's full BitFit). Its smaller form, the biases of the query and of the feed-forward's
first layer (from memory), is `sites=["query", "intermediate.dense"]` in BERT's names. Official learning rate: 1e-3.
References: arXiv:2106.10199; survey 1.

Use it when you want the smallest honest baseline, or a change of register and format is all that is needed: there a few vectors go far (the
quickstart's norms closed 68 % of the gap). New knowledge needs weights; on bases without biases merging is refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.base import Base
from lorakit.core.combine import Combine
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec
from lorakit.core.method import Method, method
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.parts.unfrozen.norms import Norms


class Shift(Delta):
    """b [d_out]; the weight does not change."""

    provides = frozenset({"shift"})
    trains = frozenset({"b"})

    def __init__(self, site: Site, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.d_in = site.d_in
        self.b = nn.Parameter(torch.zeros(site.d_out, dtype=dtype, device=device))

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        return self.b

    def weight(self) -> Tensor:
        return self.b.new_zeros(len(self.b), self.d_in)

    def bound(self) -> int:
        return 0


@dataclass(frozen=True)
class ShiftSpec(DeltaSpec):
    """A shift at every site."""

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"shift"})

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Shift:
        return Shift(site, dtype=dtype, device=device)

    def count(self, site: Site) -> int:
        return site.d_out


class Shifted(Combine):
    """y + b."""

    def forward(self, x: Tensor, y: Tensor, base: Base, delta: Delta, ctx: Ctx) -> Tensor:
        return delta(x, ctx).to(y.dtype).expand_as(y)  # type: ignore[no-any-return]

    def weight(self, base: Base, delta: Delta) -> Tensor:
        return delta.weight()

    def bias(self, base: Base, delta: Delta) -> Tensor:
        b: Tensor = delta.b  # type: ignore[assignment]
        return b


@dataclass(frozen=True)
class ShiftedSpec:
    """Adds the shift."""

    requires: frozenset[str] = frozenset({"shift"})

    def build(self, site: Site, base: Base, delta: Delta) -> Shifted:
        return Shifted()

    def count(self, site: Site) -> int:
        return 0

    def full_rank(self) -> bool:
        return False


@method("bitfit", paper="arXiv:2106.10199", survey="1", kind="biases")
def bitfit(sites: Where = "all-linear", train_norms: bool = True, unfreeze: tuple[str, ...] = ()) -> Method:
    """Biases only: those of the linear layers and of the norms."""
    extra = (Norms(only_biases=True),) if train_norms else ()
    return Method(ShiftSpec(), combine=ShiftedSpec(), sites=sites, unfreeze=(*unfreeze, *extra))
