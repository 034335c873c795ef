"""What an adapter holds: sites, ranks, the norm of every update, its spectrum, bytes, and the base it was made for.

    s·B·A = Q_B (s R_B R_Aᵀ) Q_Aᵀ        B = Q_B R_B,  Aᵀ = Q_A R_A

The singular values of the update are those of the r × r matrix in the middle: the update itself is never formed where there are factors.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from lorakit.adapters.compress import compressed
from lorakit.adapters.diagnose.plot import DOT, canvas, count_from_one, layer_color, saved
from lorakit.adapters.diagnose.spectrum import effective_rank
from lorakit.adapters.update import singular_values
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Delta
from lorakit.core.fingerprint import Fingerprint
from lorakit.core.site import ROOT, Site


@dataclass(frozen=True)
class SiteReport:
    """One site's update."""

    name: str
    role: str
    layer: int | None
    d_out: int
    d_in: int
    rank: int | None
    """Of the tensors; an update may use less of it. None where the weight does not change: a module, a bias."""
    norm: float
    """Frobenius norm of the update; of the site's tensors together where the weight does not change."""
    singular_values: list[float] = field(repr=False)
    experts: int | None = None
    """How many updates of this shape are stacked; norm and singular values are those of all of them together."""

    @property
    def shape(self) -> str:
        """For people."""
        return "×".join(str(d) for d in (self.experts, self.d_out, self.d_in) if d is not None)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the squared singular values' shares: how many directions matter; 0 for an update of zero."""
        return effective_rank(torch.tensor(self.singular_values, dtype=torch.float64))


@dataclass(frozen=True)
class Report:
    """What `lorakit inspect` prints."""

    recipe: str
    kwargs: dict[str, Any]
    sites: list[SiteReport]
    layers: dict[str, float]
    """Frobenius norm of all updates of a layer; "other" for what lies in none."""
    bytes: dict[str, int]
    """Of the tensors, and of each file where a folder is given."""
    unfrozen: dict[str, list[int]]
    """Shapes of parameters trained as a whole."""
    base: dict[str, Any] | None
    rescales: bool
    """Whether the method also rescales W: the norms are those of s·B·A alone, the rest depends on the base."""
    shared: dict[str, list[int]] = field(default_factory=dict)
    """Shapes of what the sites share and of what patches of the model train: a pool, a prefix."""
    compressed: dict[str, Any] | None = None
    """The settings of `lorakit compress`, where its result has not been changed since."""

    @property
    def notes(self) -> list[str]:
        """What the norms are, where that needs saying, and how the values were made so few."""
        found = ["norms of s·B·A alone: the method also rescales W"] if self.rescales else []
        if any(s.rank is None for s in self.sites):
            found = ["norms of the sites' tensors: the weights do not change"]
        if self.compressed is not None:
            found.append("compressed: " + ", ".join(f"{name} {value}" for name, value in self.compressed.items()))
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "sites": [{**asdict(s), "effective_rank": s.effective_rank} for s in self.sites]}

    def table(self) -> Table:
        """For people."""
        size = f"{self.bytes['tensors'] / 1e6:.2f} MB"
        base = Fingerprint(**self.base) if self.base else "an unknown base"
        title = f"{self.recipe}, {len(self.sites)} sites, {size}, made for {base}"
        table = Table(title=Text(title), caption=Text("\n".join(self.notes)) if self.notes else None)
        for column in ("site", "shape", "rank", "effective rank", "norm", "largest σ"):
            table.add_column(column, justify="left" if column == "site" else "right", overflow="fold")
        for s in self.sites:
            figures = (f"{s.effective_rank:.1f}", f"{s.norm:.3g}", f"{max(s.singular_values, default=0.0):.3g}")
            rank = "-" if s.rank is None else str(s.rank)
            table.add_row(Text(s.name), s.shape, rank, *figures)  # Text: the brackets of c_attn[q] are no markup
        for name, shape in self.unfrozen.items():
            table.add_row(Text(name), "×".join(map(str, shape)), "whole", "", "", "")
        for name, shape in self.shared.items():
            table.add_row(Text(name), "×".join(map(str, shape)), "shared", "", "", "")
        return table


def inspect_adapter(adapter: Adapter, *, folder: str | Path | None = None) -> Report:
    """The report of an adapter; with its folder also the sizes of its files."""
    sites = [_site(site, delta) for site, delta in zip(adapter.sites, adapter.deltas().values(), strict=True)]
    return Report(
        adapter.recipe.name,
        {k: v for k, v in adapter.recipe.kwargs.items() if not callable(v)},
        sites,
        _by_layer(sites),
        {"tensors": sum(t.nbytes for t in adapter.tensors.values())} | _files(folder),
        {name: list(t.shape) for name, t in adapter.unfrozen().items()},
        adapter.meta.get("base"),
        adapter.method().combine.full_rank(),
        {name: list(t.shape) for name, t in adapter.tensors.items() if name.startswith(f"{ROOT}.")},
        compressed(adapter),
    )


def _site(site: Site, delta: Delta) -> SiteReport:
    if not delta.linear or delta.bound() == 0:
        norm = math.sqrt(sum(p.double().square().sum().item() for p in delta.parameters()))
        return SiteReport(site.name, site.role, site.layer, site.d_out, site.d_in, None, norm, [], site.experts)
    f = delta.factors()
    values = singular_values(f) if f is not None else torch.linalg.svdvals(delta.weight().double())
    rank = f.A.shape[-2] if f is not None else delta.bound()
    sizes = (site.d_out, site.d_in, rank, values.norm().item(), values.tolist(), site.experts)
    return SiteReport(site.name, site.role, site.layer, *sizes)


def _by_layer(sites: list[SiteReport]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for s in sites:
        key = "other" if s.layer is None else str(s.layer)
        squares[key] = squares.get(key, 0.0) + s.norm**2
    return {key: math.sqrt(square) for key, square in squares.items()}


def _files(folder: str | Path | None) -> dict[str, int]:
    if folder is None or not Path(folder).is_dir():
        return {}
    return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir()) if path.is_file()}


def spectrum_plot(report: Report, png: str | Path) -> Path:
    """Every site's singular values relative to its largest, colored by layer. Raises MissingExtra without matplotlib."""
    figure = canvas(7, 4.5)
    axes = figure.subplots()
    layers = sorted({s.layer for s in report.sites if s.layer is not None})
    for s in report.sites:
        top = max(s.singular_values, default=0.0)
        if top > 0:
            shares = [value / top for value in s.singular_values]
            axes.plot(range(1, len(shares) + 1), shares, ".-", color=layer_color(s.layer, layers), linewidth=1, markersize=DOT, alpha=0.7)
    count_from_one(axes, max((len(s.singular_values) for s in report.sites), default=0))
    axes.set(xlabel="index", ylabel="σ / largest σ", ylim=(0, 1.05))
    axes.set_title(f"{report.recipe}: spectra of {len(report.sites)} updates, early layers dark")
    return saved(figure, png)
