"""How much an update amplifies directions that W has but does not emphasize: LoRA, section 7.3 (arXiv:2106.09685).

    factor = ‖ΔW‖ / ‖UᵀWV‖        ΔW = U diag(σ) Vᵀ, U: d_out × r, V: d_in × r

‖UᵀWV‖ is what W already does in the update's directions. Two controls say what it is in others: in W's own r strongest, where it is
largest, and in random ones, where it is ‖W‖ r / √(d_out d_in) as a root mean square (no draw is needed). An update that follows W's
strongest directions has as factor the ratio of sizes; one that W does nothing along has an infinite one.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lorakit.adapters.diagnose.update import EXACT, Update
from lorakit.adapters.diagnose.updates import Updates, beside
from lorakit.core.adapter import Adapter
from lorakit.core.random import generator
from lorakit.core.site import Site, Where, among

OVERSAMPLING, ROUNDS, SETTLED = 10, 50, 1e-6
"""Of the subspace iteration: columns beyond r, at most so many rounds, and the relative change at which it ends."""


@dataclass(frozen=True)
class Amplification:
    """One weight."""

    name: str
    role: str
    layer: int | None
    rank: int
    norm: float
    """‖ΔW‖."""
    weight: float
    """‖W‖."""
    along_update: float
    """‖UᵀWV‖ with the update's singular vectors; 0 where it is no more than rounding."""
    along_weight: float
    """With W's own strongest."""
    along_random: float
    """With random ones, root mean square."""

    @property
    def factors(self) -> dict[str, float | None]:
        """‖ΔW‖ over each of them; infinite over 0, None for an update of zero."""
        found = {"factor": self.along_update, "factor_weight": self.along_weight, "factor_random": self.along_random}
        return {name: (self.norm / along if along else math.inf) if self.rank else None for name, along in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: what is infinite is null, as its denominator of 0 shows."""
        return asdict(self) | {name: value if value is not None and math.isfinite(value) else None for name, value in self.factors.items()}


@dataclass(frozen=True)
class Amplifications:
    """What `lorakit diagnose amplification` prints."""

    adapter: str
    sites: list[Amplification]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"adapter": self.adapter, "sites": [s.as_dict() for s in self.sites], "notes": self.notes}

    def table(self) -> Table:
        """For people."""
        caption = "factor: ‖ΔW‖ / ‖UᵀWV‖ with U, V of the update; then with W's own strongest directions, and with random ones"
        table = Table(title=Text(f"amplification by {self.adapter}"), caption=Text("\n".join([caption, *self.notes])))
        table.add_column("weight", overflow="fold")
        for column in ("rank", "‖ΔW‖", "‖W‖", "‖UᵀWV‖", "of W", "random", "factor", "of W", "random"):
            table.add_column(column, justify="right")
        for s in self.sites:
            figures = (s.norm, s.weight, s.along_update, s.along_weight, s.along_random, *s.factors.values())
            table.add_row(Text(s.name), str(s.rank), *("-" if v is None else f"{v:.3g}" for v in figures))
        return table


def amplifications(adapter: Adapter, model: nn.Module, *, name: str = "the adapter", where: Where | None = None) -> Amplifications:
    """Of every site; a stack of experts is one weight for each. The model is the adapter's base."""
    updates, sites = Updates.of(adapter, model), list(adapter.sites)
    found = []
    for site in sites if where is None else among(sites, where):
        pairs = list(zip(updates.at(site), updates.weights(site), strict=True))
        for e, (update, W) in enumerate(pairs):
            found.append(amplification(site, update, W, name=site.name if len(pairs) == 1 else f"{site.name}[{e}]"))
    return Amplifications(name, found, beside(adapter))


def amplification(site: Site, update: Update, W: Tensor, *, name: str) -> Amplification:
    """Of one update of W [d_out, d_in]."""
    U, S, V = update.thin
    r, size = len(S), W.double().norm().item()
    along = projected(U, W, V)
    if along <= r * max(W.shape) * EXACT * size:
        along = 0.0
    by_chance = size * r / math.sqrt(W.shape[0] * W.shape[1])
    return Amplification(name, site.role, site.layer, r, S.norm().item(), size, along, strongest(W, r).norm().item(), by_chance)


def projected(U: Tensor, W: Tensor, V: Tensor) -> float:
    """‖UᵀWV‖ in fp64, of W some rows at a time."""
    blocks = zip(U.split(1024), W.split(1024), strict=True)
    core = sum((u.T @ (w.double() @ V) for u, w in blocks), U.new_zeros(U.shape[1], V.shape[1]))
    return float(core.norm())


def strongest(W: Tensor, r: int) -> Tensor:
    """W's r largest singular values [r], by subspace iteration until they settle; never larger than they are."""
    columns = min(r + OVERSAMPLING, *W.shape)
    Y = torch.linalg.qr(W @ torch.randn(W.shape[1], columns, generator=generator(0, "strongest"), dtype=W.dtype)).Q
    before = 0.0
    for _ in range(ROUNDS):
        Z = torch.linalg.qr(W.T @ Y).Q
        Y, R = torch.linalg.qr(W @ Z)
        values: Tensor = torch.linalg.svdvals(R)[:r]
        now = values.norm().item()
        if now - before <= SETTLED * now:
            break
        before = now
    return values
