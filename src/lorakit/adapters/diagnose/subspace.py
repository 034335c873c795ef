"""Which directions two adapters have in common: the subspace similarity of LoRA (arXiv:2106.09685, section 7.2 and appendix G).

    φ(i, j) = ‖U_a^(i)ᵀ U_b^(j)‖² / min(i, j) ∈ [0, 1]        i ≤ r_a, j ≤ r_b

U^(i) are the first i singular vectors; two spaces at random have max(i, j) / d. The paper takes those of A. What an adapter does depends on
the row space of B·A alone, which is that of A only where B has full column rank, so ΔW's is the default here. It does not depend on how ΔW
was split (A → G A, B → B G⁻¹). Where A is taken alone, φ(r_a, r_b) does not either, while its singular vectors, and φ below that, do.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lorakit.adapters.diagnose.lineup import lineup, lone
from lorakit.adapters.diagnose.update import EXACT, Update
from lorakit.adapters.diagnose.updates import Updates, beside
from lorakit.core.adapter import Adapter
from lorakit.core.errors import BadParameter, NotExportable, did_you_mean
from lorakit.core.site import Where


def phi(U: Tensor, V: Tensor) -> Tensor:
    """φ(i, j) of orthonormal columns U [d, a] and V [d, b]: [a, b]."""
    shared = (U.T @ V).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=U.dtype) for n in shared.shape)
    return (shared / torch.minimum(i[:, None], j)).clamp(max=1.0)


def _right_of_A(update: Update) -> Tensor:
    return _left(_factor(update.A).T)


def _left_of_B(update: Update) -> Tensor:
    _factor(update.A)
    return _left(update.B)


SPACES: dict[str, Callable[[Update], Tensor]] = {
    "rows": lambda update: update.thin.V,
    "columns": lambda update: update.thin.U,
    "A": _right_of_A,
    "B": _left_of_B,
}
"""Singular vectors, strongest first: right ones of ΔW, left ones of ΔW, right ones of A alone, left ones of B alone."""


def _factor(A: Tensor | None) -> Tensor:
    if A is None:
        raise NotExportable("an adapter without factors has no A and no B; compare the rows or the columns of its update")
    return A


def _left(M: Tensor) -> Tensor:
    """Left singular vectors of a tall matrix, those of zeros left out."""
    U: Tensor
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    return U[:, : int(S.gt(len(M) * EXACT * S[:1]).sum())]


@dataclass(frozen=True)
class SiteOverlap:
    """One weight."""

    name: str
    role: str
    layer: int | None
    d: int
    """Dimension of the space that the directions lie in."""
    ranks: tuple[int, int]
    """(r_a, r_b): 0 of an update of zero."""
    grid: list[list[float]] = field(repr=False)
    """φ(i, j): r_a × r_b; empty where one of the updates is zero."""

    @property
    def chance(self) -> float | None:
        """What φ(r_a, r_b) is of spaces at random; None where there is no φ."""
        return max(self.ranks) / self.d if self.grid else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "ranks": list(self.ranks), "chance": self.chance}


@dataclass(frozen=True)
class Overlaps:
    """What `lorakit diagnose subspace` prints."""

    a: str
    b: str
    space: str
    sites: list[SiteOverlap]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"a": self.a, "b": self.b, "space": self.space, "sites": [s.as_dict() for s in self.sites], "notes": self.notes}

    def table(self) -> Table:
        """For people."""
        caption = "φ: 1 the same space, 0 orthogonal ones; by chance: φ(r_a, r_b) of two spaces at random"
        table = Table(title=Text(f"{self.space} of {self.a} and {self.b}"), caption=Text("\n".join([caption, *self.notes])))
        table.add_column("weight", overflow="fold")
        for column in ("d", "r_a × r_b", "φ(1, 1)", "φ(r_a, r_b)", "by chance"):
            table.add_column(column, justify="right")
        for s in self.sites:
            figures = (s.grid[0][0], s.grid[-1][-1], s.chance) if s.grid else (None, None, None)
            table.add_row(Text(s.name), str(s.d), "×".join(map(str, s.ranks)), *("-" if v is None else f"{v:.3f}" for v in figures))
        return table


def overlaps(
    adapters: Mapping[str, Adapter],
    *,
    space: str = "rows",
    where: Where | None = None,
    model: nn.Module | None = None,
    force: bool = False,
) -> Overlaps:
    """φ of two named adapters at every weight that both change; a stack of experts is one weight for each. Raises as `distance` does."""
    if len(adapters) != 2:
        raise BadParameter(f"subspaces are compared of two adapters; given: {len(adapters)}")
    if space not in SPACES:
        raise BadParameter(f"there is no space {space!r}. {did_you_mean(space, SPACES)}")
    (a, b), sources = adapters, [Updates.of(adapter, model) for adapter in adapters.values()]
    found = []
    places = lineup(adapters, where, force=force)
    for place in places:
        ones, others = (place.updates(i, updates) for i, updates in enumerate(sources))
        pairs = list(zip(ones, others, strict=True)) if ones and others else []
        names = [place.name] if len(pairs) == 1 else [f"{place.name}[{e}]" for e in range(len(pairs))]
        for name, (one, other) in zip(names, pairs, strict=True):
            U, V = SPACES[space](one), SPACES[space](other)
            ranks = (U.shape[1], V.shape[1])
            found.append(SiteOverlap(name, place.role, place.layer, len(U), ranks, phi(U, V).tolist() if all(ranks) else []))
    notes = [f"{name}: {note}" for name, adapter in adapters.items() for note in beside(adapter)]
    alone = [(one, names) for one, names in ((a, lone(places, 0, 1)), (b, lone(places, 1, 0))) if names]
    return Overlaps(
        a, b, space, found, notes + [f"{len(names)} weights only in {one} are left out ({names[0]}, …)" for one, names in alone]
    )
