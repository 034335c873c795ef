"""The delta of nearly the whole survey: ΔW = s · (B · diag(g) · A − B₀ · A₀).

A, B trained, frozen or gated by g; the anchor (A₀, B₀), where there is one, is what an init that starts at W's own components subtracts,
so that ΔW = 0 at the start and the base is never touched (PiSSA: 2404.02948). An anchored delta is plain LoRA of rank 2r:
B' = [B, −B₀], A' = [A; A₀].

The same pair holds the legs of a chain (ReLoRA): `retire` moves the live pair behind the earlier ones, r rows a leg. A base may absorb
legs, one assignment each, so that forward stays of rank r; `expel` in core/layer.py gives the base its bits back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core import random, resize
from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec, Factors, Product
from lorakit.core.errors import Incompatible
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared, refuse_shapes
from lorakit.core.site import MIXTURES, MODULES, Kind, Site
from lorakit.ops.grouped import each

Squash = Literal["none", "softmax", "sigmoid"]
SQUASH: dict[Squash, Callable[[Tensor], Tensor]] = {
    "none": lambda g: g,
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
}
"""What the gate is of the stored g."""


class LowRank(Delta):
    """One site's A [r, d_in], B [d_out, r], and optionally g [r], A0 [r, d_in], B0 [d_out, r]. At experts A, B have E in front."""

    A: nn.Parameter
    B: nn.Parameter
    g: nn.Parameter | None
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, site: Site, spec: "LowRankSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.r, self.s = spec.rank.at(site)
        self.p, self.stream = spec.dropout, random.stream(site.name)
        self.draws, self.flexible, self.squash = spec.dropout > 0, spec.flexible, spec.squash
        self.provides, self.trains = spec.provides, frozenset(spec.train)

        stack = () if site.experts is None else (site.experts,)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*stack, *shape, dtype=dtype, device=device)

        self.A = nn.Parameter(empty(self.r, site.d_in), requires_grad="A" in self.trains)
        self.B = nn.Parameter(empty(site.d_out, self.r), requires_grad="B" in self.trains)
        self.register_parameter("g", nn.Parameter(empty(self.r), requires_grad="g" in self.trains) if spec.gate else None)
        behind = self.r if spec.anchor else 0
        self.register_buffer("A0", empty(behind, site.d_in) if spec.anchor or spec.legs else None)
        self.register_buffer("B0", empty(site.d_out, behind) if spec.anchor or spec.legs else None)

    def product(self, ctx: Ctx) -> Product | None:
        return None if self.A.ndim == 3 else Product(self._down(), self._up(), self.s)  # 2r wide with an anchor

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        if self.A.ndim == 3:  # one pair for each expert
            A, B = self.A.to(x.dtype), self.B.to(x.dtype)
            return each(each(x, A, ctx.ends) * self.s, B, ctx.ends)
        return super().forward(x, ctx)

    def weight(self) -> Tensor:
        delta = self.B @ self._gated()
        if self.A0 is not None and self.B0 is not None:
            delta = delta - self.B0[:, self.absorbed :] @ self.A0[self.absorbed :]
        return delta.mul_(self.s)

    def factors(self) -> Factors:
        return Factors(self._down(), self._up(), self.s)

    def bound(self) -> int:
        return self.r + (0 if self.A0 is None else len(self.A0) - self.absorbed)

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        r = shapes["A"][-2] if "A" in shapes else self.r
        if r != self.r and self.flexible:
            self.resize(r)
        if self.A0 is not None and self.B0 is not None and "A0" in shapes and "legs" in self.provides:
            self.A0, self.B0 = self.A0.new_zeros(shapes["A0"][0], self.A0.shape[1]), self.B0.new_zeros(self.B0.shape[0], shapes["A0"][0])
        refuse_shapes(self, shapes)

    def resize(self, r: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Cut to the first r components, or append components of zeros. The scale stays."""
        if r < self.r:
            self.keep(torch.arange(r, device=self.A.device), optimizer)
        for name, dim in self._components():
            shape = list(getattr(self, name).shape)
            shape[dim] = r - self.r
            if shape[dim]:
                resize.append(optimizer, self, name, self.A.new_zeros(shape), dim)
        self.r = r

    def keep(self, index: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keep these components, in this order."""
        for name, dim in self._components():
            resize.keep(optimizer, self, name, index, dim)
        self.r = len(index)

    @torch.no_grad()
    def retire(self) -> None:
        """Move the live pair, its gate folded in, behind the legs; A, B and g stay as they are, to be set anew."""
        assert self.A0 is not None and self.B0 is not None
        A = self._gated()
        self.A0, self.B0 = torch.cat([self.A0, A.detach()]), torch.cat([self.B0, -self.B.detach()], dim=1)

    @torch.no_grad()
    def absorb_(self, base: Base) -> None:
        """Move the legs that the base does not hold yet into its weight, one by one, as they came."""
        assert self.A0 is not None and self.B0 is not None
        wide = torch.promote_types(base.dtype, self.A0.dtype)
        while self.absorbed < len(self.A0):
            leg = slice(self.absorbed, min(self.absorbed + self.r, len(self.A0)))
            base.assign_(base.dense(wide) - self.s * (self.B0[:, leg] @ self.A0[leg]))
            self.absorbed = leg.stop

    def _down(self) -> Tensor:
        A = self._gated()
        return A if self.A0 is None or len(self.A0) == self.absorbed else torch.cat([A, self.A0[self.absorbed :]])

    def _up(self) -> Tensor:
        return self.B if self.B0 is None or self.B0.shape[1] == self.absorbed else torch.cat([self.B, -self.B0[:, self.absorbed :]], dim=1)

    def _gated(self) -> Tensor:
        """diag(gate) A."""
        return self.A if self.g is None else SQUASH[self.squash](self.g)[:, None] * self.A

    def _components(self) -> list[tuple[str, int]]:
        """Tensors with one slice a component, and the dimension it lies along."""
        return [("A", -2), ("B", -1), *([("g", -1)] if self.g is not None else [])]


@dataclass(frozen=True)
class LowRankSpec(DeltaSpec):
    """Rank and scale, input dropout, what is trained; whether there is a gate g, an anchor that the init leaves, legs of a chain;
    whether ranks may become others than the recipe's (they are then read from a file's shapes)."""

    rank: Rank
    dropout: float = 0.0
    train: tuple[str, ...] = ("A", "B")
    gate: bool = False
    anchor: bool = False
    legs: bool = False
    flexible: bool = False
    squash: Squash = "none"

    def __post_init__(self) -> None:
        random.check_dropout(self.dropout)
        if self.anchor and self.legs:
            raise Incompatible("a start that subtracts its own anchor cannot be restarted: the legs of a chain take the anchor's place")

    @property
    def provides(self) -> frozenset[str]:
        has = {"gate": self.gate, "anchor": self.anchor, "legs": self.legs}
        return frozenset({"factors"} | {name for name, there in has.items() if there})

    @property
    def kinds(self) -> frozenset[Kind]:
        return MODULES if self.gate or self.anchor or self.legs else MIXTURES

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> LowRank:
        return LowRank(site, self, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        self.rank.check(sites)

    def count(self, site: Site) -> int:
        r, _ = self.rank.at(site)
        values = r * (site.d_in * ("A" in self.train) + site.d_out * ("B" in self.train) + ("g" in self.train))
        return values * (site.experts or 1)
