"""How far apart adapters are, weight by weight and in total: cosine, overlap of subspaces, conflict of signs.

    cosine      ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖),  ⟨ΔW_a, ΔW_b⟩ = Σ_ij σ_i τ_j (U_aᵀU_b)_ij (V_aᵀV_b)_ij
    overlap     ‖V_aᵀV_b‖² / min(r_a, r_b) of the row spaces, with U of the column spaces: φ(r_a, r_b) of LoRA (arXiv:2106.09685, 7.2);
                two spaces at random have max(r_a, r_b) / d
    conflict    the share of entries of opposite sign among those that neither has at zero; two updates at random have a half.
                Weighted: Σ min(|a|, |b|) over these / Σ min(|a|, |b|) over all

Cosine and overlap are those of the factors, exactly; signs are counted some rows at a time. Whatever the adapters' ranks, scales, methods
and sites: a weight that only one of them changes counts as zero in the other, and is listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lorakit.adapters.diagnose.lineup import Place, lineup, lone
from lorakit.adapters.diagnose.update import Update
from lorakit.adapters.diagnose.updates import Updates, beside
from lorakit.core.adapter import Adapter
from lorakit.core.errors import BadParameter
from lorakit.core.site import Where

BLOCK = 2**16
"""Entries of an update that are made at a time: they stay in the cache, which is three times as fast as 2**19."""


@dataclass(frozen=True)
class Tally:
    """What two updates are to each other, in numbers that add up over weights. A figure is None where it is 0 / 0."""

    inner: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    rows: float = 0.0
    """‖V_aᵀV_b‖²."""
    columns: float = 0.0
    """‖U_aᵀU_b‖²."""
    rows_chance: float = 0.0
    columns_chance: float = 0.0
    directions: float = 0.0
    """min(r_a, r_b)."""
    conflicts: float = 0.0
    entries: float = 0.0
    """Where neither is zero."""
    opposed: float = 0.0
    smaller: float = 0.0
    """Σ min(|a|, |b|)."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def cosine(self) -> float | None:
        """−1 to 1; None where one of them is zero."""
        found = _ratio(self.inner, (self.square_a * self.square_b) ** 0.5)
        return None if found is None else max(-1.0, min(1.0, found))

    @property
    def figures(self) -> dict[str, float | None]:
        """Everything by name."""
        return {
            "cosine": self.cosine,
            "row_overlap": _ratio(self.rows, self.directions),
            "row_chance": _ratio(self.rows_chance, self.directions),
            "column_overlap": _ratio(self.columns, self.directions),
            "column_chance": _ratio(self.columns_chance, self.directions),
            "sign_conflict": _ratio(self.conflicts, self.entries),
            "weighted_conflict": _ratio(self.opposed, self.smaller),
        }


DIAGONAL: Mapping[str, float | None] = {
    "cosine": 1.0, "row_overlap": 1.0, "row_chance": None, "column_overlap": 1.0, "column_chance": None, "sign_conflict": 0.0,
    "weighted_conflict": 0.0,
}  # fmt: skip
"""Of an adapter and itself, where nothing is left to chance."""


@dataclass(frozen=True)
class Pair:
    """Two adapters."""

    a: str
    b: str
    sites: dict[str, Tally]
    """By weight: those that both change."""
    only_a: list[str]
    only_b: list[str]
    total: Tally

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        sites = {name: tally.figures for name, tally in self.sites.items()}
        return {"a": self.a, "b": self.b, **self.total.figures, "only_a": self.only_a, "only_b": self.only_b, "sites": sites}


@dataclass(frozen=True)
class Distances:
    """Of every two of several adapters: what `lorakit distance` prints."""

    names: list[str]
    pairs: list[Pair]
    notes: list[str]

    def matrix(self, figure: str) -> list[list[float | None]]:
        """N × N of one figure of the totals."""
        n, of = len(self.names), {(p.a, p.b): p.total.figures[figure] for p in self.pairs}
        own = DIAGONAL[figure]
        return [[own if i == j else of[self.names[min(i, j)], self.names[max(i, j)]] for j in range(n)] for i in range(n)]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        matrices = {figure: self.matrix(figure) for figure in DIAGONAL}
        return {"adapters": self.names, "matrices": matrices, "pairs": [p.as_dict() for p in self.pairs], "notes": self.notes}

    def table(self) -> Table:
        """For people: of two adapters every weight, of more every pair."""
        first, *others = self.pairs
        caption = "by chance: overlaps as in brackets, cosine 0, sign conflict 0.5"
        title = f"{first.a} and {first.b}" if not others else f"{len(self.names)} adapters"
        table = Table(title=Text(title), caption=Text("\n".join([caption, *self.notes])))
        names = ["weight"] if not others else ["a", "b"]
        for column in names:
            table.add_column(column, overflow="fold")
        for column in ("cosine", "row overlap", "column overlap", "sign conflict", "weighted"):
            table.add_column(column, justify="right")
        for pair in self.pairs:
            if not others:
                for name, tally in pair.sites.items():
                    table.add_row(Text(name), *_cells(tally))
                table.add_section()
            table.add_row(*(["total"] if not others else [Text(pair.a), Text(pair.b)]), *_cells(pair.total))
        return table


def distance(
    adapters: Mapping[str, Adapter], *, where: Where | None = None, model: nn.Module | None = None, force: bool = False
) -> Distances:
    """Every two of the named adapters. A method that rescales W needs the model; `force` compares adapters of different bases.

    Raises AdapterMismatch for different bases and for adapters without a common weight, NotExportable for what is no change of weights.
    """
    if len(adapters) < 2:
        raise BadParameter(f"a distance needs at least two adapters; given: {len(adapters)}")
    sources = [Updates.of(adapter, model) for adapter in adapters.values()]
    places = lineup(adapters, where, force=force)
    couples = list(combinations(range(len(sources)), 2))
    tallies: dict[tuple[int, int], dict[str, Tally]] = {couple: {} for couple in couples}
    for place in places:
        for couple, tally in _at(place, sources, couples).items():
            tallies[couple][place.name] = tally
    names = list(adapters)
    notes = [f"{name}: {note}" for name, adapter in adapters.items() for note in beside(adapter)]
    pairs = [_pair(names, i, j, places, tallies[i, j]) for i, j in couples]
    return Distances(names, pairs, notes + [note for pair in pairs for note in _zeros(pair)])


def _pair(names: Sequence[str], i: int, j: int, places: Sequence[Place], tallies: Mapping[str, Tally]) -> Pair:
    only_a, only_b = lone(places, i, j), lone(places, j, i)
    both = {p.name: tallies[p.name] for p in places if p.sites[i] and p.sites[j]}
    return Pair(names[i], names[j], both, only_a, only_b, sum(tallies.values(), Tally()))


def _zeros(pair: Pair) -> list[str]:
    lists = ((pair.a, pair.b, pair.only_a), (pair.b, pair.a, pair.only_b))
    return [f"{len(names)} weights only in {one}, zero in {other} ({names[0]}, …)" for one, other, names in lists if names]


def _at(place: Place, sources: Sequence[Updates], couples: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tally]:
    """Of every two adapters at one weight."""
    stacks = [place.updates(i, updates) for i, updates in enumerate(sources)]
    found = {couple: Tally() for couple in couples}
    for e in range(max(map(len, stacks))):
        here = {i: stack[e] for i, stack in enumerate(stacks) if stack}
        for i, j in couples:
            found[i, j] += _spaces(here.get(i), here.get(j))
        for couple, tally in _signs(here, couples).items():
            found[couple] += tally
    return found


def _spaces(a: Update | None, b: Update | None) -> Tally:
    """What the thin decompositions say."""
    squares = {f"square_{n}": 0.0 if u is None else u.thin.S.square().sum().item() for n, u in (("a", a), ("b", b))}
    if a is None or b is None:
        return Tally(**squares)
    one, other = a.thin, b.thin
    left, right = one.U.T @ other.U, one.V.T @ other.V
    inner = (one.S @ (left * right) @ other.S).item()
    (d_out, d_in), product = a.shape, one.rank * other.rank
    rows = {"rows": right.square().sum().item(), "rows_chance": product / d_in}
    columns = {"columns": left.square().sum().item(), "columns_chance": product / d_out}
    return Tally(inner, directions=min(one.rank, other.rank), **squares, **rows, **columns)


def _signs(here: Mapping[int, Update], couples: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Tally]:
    """What the entries say, of those couples that are here; each update's rows are made once."""
    met = [couple for couple in couples if set(couple) <= here.keys()]
    needed = sorted({i for couple in met for i in couple})
    found = {couple: Tally() for couple in met}
    if not met:
        return found
    d_out, d_in = here[needed[0]].shape
    step = max(1, BLOCK // d_in)
    for start in range(0, d_out, step):
        rows = {i: here[i].rows(slice(start, start + step)) for i in needed}
        for i, j in met:
            found[i, j] += _conflict(rows[i], rows[j])
    return found


def _conflict(a: Tensor, b: Tensor) -> Tally:
    signs, smaller = a.sign() * b.sign(), a.abs().minimum(b.abs())
    against = signs < 0
    entries, opposed = int(signs.count_nonzero()), (smaller * against).sum().item()
    return Tally(conflicts=int(against.sum()), entries=entries, opposed=opposed, smaller=smaller.sum().item())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _cells(tally: Tally) -> list[str]:
    f = {name: "-" if value is None else f"{value:.3f}" for name, value in tally.figures.items()}
    overlaps = (f"{f[f'{side}_overlap']} ({f[f'{side}_chance']})" for side in ("row", "column"))
    return [f["cosine"], *overlaps, f["sign_conflict"], f["weighted_conflict"]]
