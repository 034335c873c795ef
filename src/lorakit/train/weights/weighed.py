"""Finished adapters on one model, all at once, under weights that a search or a gradient sets.

    delta         ΔW = Σ_i w_i s_i B_i A_i                            one product of rank Σ r, whose gate is w_i at each of i's components
    factor        ΔW = (Σ_i √|w_i s_i| B_i)(Σ_i ±√|w_i s_i| A_i)      the sign is w_i's
    factor:both   ΔW = (Σ_i w_i √s_i B_i)(Σ_i w_i √s_i A_i)

as adapters/mix/spaces.py has them. The adapters' tensors are attached once and never written; w is the one trained tensor, places × N: one
row for the model, for each layer, or for each module. Setting w costs nothing, and its gradient comes by the gate, from the fused function
too (ops/lora_linear.py), with no gradient for A or B and no input kept for one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.adapters.mix.mix import Weight
from lorakit.adapters.mix.parts import Sources
from lorakit.adapters.peft_rank import exactly
from lorakit.core.adapter import POOL, Adapter
from lorakit.core.attach import Adapted
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors, Product
from lorakit.core.errors import Incompatible
from lorakit.core.fingerprint import check_base
from lorakit.core.fresh import sites_for
from lorakit.core.method import Method
from lorakit.core.shared import Shared
from lorakit.core.site import MIXTURES, Kind, Site, sites_of
from lorakit.ops import reference
from lorakit.ops.grouped import each

Space = Literal["delta", "factor", "factor:both"]
Granularity = Literal["model", "layer", "module"]
Rows = Sequence[Sequence[float]]
"""The weights of each place, one an adapter."""

PLACES: Mapping[Granularity, Callable[[Site], Hashable]] = {
    "model": lambda site: "model",
    "layer": lambda site: site.layer,
    "module": lambda site: site.name,
}
"""What the sites that share weights have in common. What lies outside the layers counts as one layer."""


class Weights(Shared):
    """w [places, N]: `v` itself, or its softmax."""

    trains = frozenset({"v"})

    def __init__(self, place: Mapping[str, int], n: int, *, softmax: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.place, self.softmax = place, softmax
        self.v = nn.Parameter(torch.zeros(1 + max(place.values()), n, dtype=dtype, device=device))

    def forward(self) -> Tensor:
        """w."""
        return self.v.softmax(-1) if self.softmax else self.v

    def at(self, name: str) -> Tensor:
        """A site's weights: [N]."""
        return self()[self.place[name]]  # type: ignore[no-any-return]


class Weighed(Delta, ABC):
    """One site's frozen updates under the pool's weights; `owner` [n]: to which adapter each weight belongs."""

    owner: Tensor
    A: Tensor
    B: Tensor

    def __init__(self, site: Site, pool: Weights, owner: Sequence[int], *, device: torch.device) -> None:
        super().__init__()
        self.name, self.pools = site.name, (pool,)  # in a tuple, so that it is registered once, at the model's root
        self.register_buffer("owner", torch.tensor(owner, device=device))

    def weights(self) -> Tensor:
        """[n]."""
        (pool,) = self.pools
        return pool.at(self.name)[self.owner]

    @abstractmethod
    def pair(self) -> Product:
        """What x is multiplied by, at experts stacked."""

    def product(self, ctx: Ctx) -> Product | None:
        f = self.pair()
        return f if f.A.ndim == 2 else None

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        f = self.pair()
        if f.A.ndim == 2:
            return reference.low_rank(x, f.A, f.B, f.s, f.g)
        z = each(x, f.A.to(x.dtype), ctx.ends)
        return each(z if f.g is None else z * f.g.to(x.dtype), f.B.to(x.dtype), ctx.ends)

    def weight(self) -> Tensor:
        f = self.pair()
        return (f.B if f.g is None else f.B * f.g) @ f.A

    def bound(self) -> int:
        return self.A.shape[-2]


class Joined(Weighed):
    """Σ w s B A: A [R, d_in], B [d_out, R] side by side, s in B, w the gate."""

    def __init__(
        self, site: Site, parts: Sequence[tuple[int, Factors]], pool: Weights, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(site, pool, [i for i, f in parts for _ in range(f.A.shape[-2])], device=device)
        self.register_buffer("A", torch.cat([f.A for _, f in parts], -2).to(device, dtype))
        self.register_buffer("B", torch.cat([f.s * f.B for _, f in parts], -1).to(device, dtype))

    def pair(self) -> Product:
        return Product(self.A, self.B, 1.0, self.weights())


Split = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(w, s) of each adapter -> what its A and its B are multiplied by."""


def roots(w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """±√|w s| and √|w s|."""
    root = (w * s).abs().sqrt()
    return root * (w * s).sign(), root


def both(w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """w √|s|, twice; the sign of s is B's."""
    size = w * s.abs().sqrt()
    return size, size * s.sign()


class Summed(Weighed):
    """(Σ b B)(Σ a A): A [n, r, d_in], B [n, d_out, r] one behind the other, added up in each forward."""

    s: Tensor

    def __init__(
        self,
        site: Site,
        parts: Sequence[tuple[int, Factors]],
        pool: Weights,
        *,
        split: Split,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(site, pool, [i for i, _ in parts], device=device)
        ranks = sorted({f.A.shape[-2] for _, f in parts})
        if len(ranks) > 1:
            raise Incompatible(
                f"{site.name}: factor space adds A and B up entry by entry, which ranks {ranks} do not allow; use space='delta'"
            )
        self.split = split
        self.register_buffer("A", torch.stack([f.A for _, f in parts]).to(device, dtype))
        self.register_buffer("B", torch.stack([f.B for _, f in parts]).to(device, dtype))
        self.register_buffer("s", torch.tensor([f.s for _, f in parts], dtype=dtype, device=device))

    def pair(self) -> Product:
        a, b = self.split(self.weights(), self.s)
        return Product(torch.tensordot(a, self.A, 1), torch.tensordot(b, self.B, 1))


SPACES: Mapping[Space, Callable[..., Weighed]] = {
    "delta": Joined,
    "factor": partial(Summed, split=roots),
    "factor:both": partial(Summed, split=both),
}


@dataclass(frozen=True)
class WeighedSpec(DeltaSpec):
    """The adapters, in which space they are put together, how fine their weights are, and whether those of a place sum up to 1."""

    sources: Sources
    space: Space = "delta"
    by: Granularity = "model"
    softmax: bool = False

    @property
    def kinds(self) -> frozenset[Kind]:
        return MIXTURES

    def pool(
        self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Weights:
        number = {key: i for i, key in enumerate(dict.fromkeys(map(PLACES[self.by], sites)))}
        place = {site.name: number[PLACES[self.by](site)] for site in sites}
        return Weights(place, len(self.sources.adapters), softmax=self.softmax, dtype=dtype, device=device)

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Weighed:
        parts = [(i, f) for i, f in enumerate(self.sources.factors(site)) if f is not None]
        return SPACES[self.space](site, parts, pool, dtype=dtype, device=device)

    def count(self, site: Site) -> int:
        return 0

    def count_shared(self, sites: Sequence[Site]) -> int:
        return len(self.sources.adapters) * len(set(map(PLACES[self.by], sites)))


@dataclass(frozen=True)
class Together:
    """The adapters on their model, and their weights."""

    adapted: Adapted
    pool: Weights

    @property
    def v(self) -> nn.Parameter:
        """What is trained: [places, N]."""
        return self.pool.v

    @torch.no_grad()
    def set_(self, rows: Rows) -> None:
        """Give v these values."""
        self.v.copy_(torch.tensor([list(row) for row in rows], dtype=torch.float64))

    def rows(self) -> tuple[tuple[float, ...], ...]:
        """The weights as they are."""
        return tuple(tuple(row) for row in self.pool().detach().double().tolist())

    def for_mix(self, rows: Rows) -> list[Weight]:
        """The same as `mix` takes them: one an adapter, or one an adapter and site."""
        columns = list(zip(*rows, strict=True))
        if len(rows) == 1:
            return [column[0] for column in columns]
        return [{exactly(name): column[i] for name, i in self.pool.place.items()} for column in columns]


NAME = "mixture"


@contextmanager
def together(
    model: nn.Module,
    adapters: Sequence[Adapter],
    *,
    space: Space = "delta",
    by: Granularity = "model",
    softmax: bool = False,
    force: bool = False,
) -> Iterator[Together]:
    """The adapters on `model` inside the block, all weights 0 (with `softmax` 1/N); after it the model is as it was, and they always are.

    Raises what `mix` does, and AdapterMismatch where the model is not the base of one of them (other weights are accepted with `force`).
    """
    sources = Sources(adapters, force=force)
    adapted = Adapted(model)
    try:
        known = sites_of(model)
        for adapter in adapters:
            check_base(adapter, adapted.fingerprint, force=force)
            sites_for(known, adapter.method(), adapter)
        names = {site.name for site in sources.sites}
        adapted.add(NAME, Method(WeighedSpec(sources, space, by, softmax), sites=lambda site: site.name in names))
        pool = adapted.shared(NAME)[POOL]
        assert isinstance(pool, Weights)
        yield Together(adapted, pool)
    finally:
        adapted.detach()
