"""The diagnostics as pictures, PNG files. Matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from itertools import accumulate
from math import ceil, inf, isfinite, nan
from pathlib import Path
from textwrap import fill
from typing import Any

from lorakit.adapters.diagnose.amplification import Amplifications
from lorakit.adapters.diagnose.distance import Distances
from lorakit.adapters.diagnose.spectrum import SHARE, Spectra
from lorakit.adapters.diagnose.subspace import Overlaps
from lorakit.core.errors import CheckpointError, MissingExtra

ACROSS = 4
"""Panels side by side."""
LEGIBLE = 44
"""Names of weights side by side."""
DOT = 4
"""Size of the dots on a line: one of a single point is nothing else."""


def canvas(width: float, height: float) -> Any:
    """An empty figure, in inches. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot: a figure of its own draws with Agg and touches no global state
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot") from error
    return Figure(figsize=(width, height), layout="constrained")


def saved(figure: Any, png: str | Path) -> Path:
    """Raises CheckpointError where the file cannot be written."""
    try:
        figure.savefig(png, dpi=150, format="png")
    except OSError as error:
        raise CheckpointError(f"cannot write the picture {png}: {error.strerror or error}") from error
    return Path(png)


def drawable(png: str | Path) -> None:
    """Raises, before anything is computed, what drawing there would raise in the end."""
    canvas(1, 1)
    folder = Path(png).absolute().parent
    if not folder.is_dir() or Path(png).is_dir():
        raise CheckpointError(
            f"cannot write the picture {png}: {f'there is no folder {folder}' if not folder.is_dir() else 'it is a folder'}"
        )


def layer_color(layer: int | None, layers: Sequence[int]) -> tuple[float, float, float]:
    """Dark blue for the first layer, light for the last."""
    shade = layers.index(layer) / max(1, len(layers) - 1) if layer is not None else 0.0
    return (0.1 + 0.5 * shade, 0.2 + 0.5 * shade, 0.5 + 0.4 * shade)


def count_from_one(axes: Any, last: int) -> None:
    """An axis of whole numbers, 1 to `last`."""
    axes.set_xlim(0.5, max(last, 1) + 0.5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


# -------------------------------------------------------------------------------------------------------------- between adapters
def distance_map(found: Distances, png: str | Path) -> Path:
    """Three N × N panels: cosine; overlap of row spaces above the diagonal and of column spaces below; conflict of signs."""
    n = len(found.names)
    rows, columns = found.matrix("row_overlap"), found.matrix("column_overlap")
    overlap = [[(rows if i <= j else columns)[i][j] for j in range(n)] for i in range(n)]
    panels = (
        ("cosine of ΔW", found.matrix("cosine"), "RdBu", -1.0),
        ("subspace overlap\nrows above, columns below the diagonal", overlap, "viridis", 0.0),
        ("share of entries of opposite sign", found.matrix("sign_conflict"), "inferno", 0.0),
    )
    side = 3 + 0.45 * n
    figure = canvas(3 * side, side)
    for axes, (title, values, colors, low) in zip(figure.subplots(1, 3), panels, strict=True):
        _heat(figure, axes, values, colors, low)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(n), found.names, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(n), found.names, parse_math=False)
        if n <= 12:
            _write(axes, values)
    return saved(figure, png)


def _heat(
    figure: Any,
    axes: Any,
    values: Sequence[Sequence[float | None]],
    colors: str,
    low: float,
    extent: tuple[float, float, float, float] | None = None,
) -> None:
    cells = [[nan if v is None else v for v in row] for row in values]
    image = axes.imshow(cells, cmap=colors, vmin=low, vmax=1.0, aspect="auto", extent=extent)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _write(axes: Any, values: Sequence[Sequence[float | None]]) -> None:
    """Every value into its cell."""
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, "-" if value is None else f"{value:.2f}", ha="center", va="center", fontsize=7, bbox=box)


def overlap_map(found: Overlaps, png: str | Path) -> Path:
    """φ(i, j), one panel a role: the mean over its weights, of those that have as many directions."""
    roles = sorted({s.role for s in found.sites if s.grid})
    figure, panels = _grid(max(1, len(roles)))
    for axes, role in zip(panels, roles, strict=False):
        grids = [s.grid for s in found.sites if s.role == role and s.grid]
        mean = _mean(grids)
        _heat(figure, axes, mean, "viridis", 0.0, (0.5, len(mean[0]) + 0.5, len(mean) + 0.5, 0.5))  # i and j begin at 1
        axes.locator_params(integer=True, min_n_ticks=1)
        axes.set_xlabel("j")
        axes.set_ylabel("i", rotation=0, labelpad=10)
        axes.set_title(f"{role}: {_weights(len(grids))}, by chance {_chance(found, role):.3f}", fontsize=9)
    if not roles:
        panels[0].axis("off")
        panels[0].text(0.5, 0.5, "no weight of which both updates\nhave directions", ha="center", va="center")
    _headed(figure, f"φ(i, j), {found.space}", f"i: {found.a}", f"j: {found.b}")
    return saved(figure, png)


def _headed(figure: Any, *lines: str) -> None:
    """Lines above all panels, broken to the figure's width: paths may be long."""
    letters = int(10 * figure.get_figwidth())
    figure.suptitle("\n".join(fill(line, letters, break_on_hyphens=False) for line in lines), fontsize=11, parse_math=False)


def _weights(n: int) -> str:
    return "1 weight" if n == 1 else f"{n} weights"


def _grid(n: int) -> tuple[Any, list[Any]]:
    across = min(n, ACROSS)
    figure = canvas(4.0 * across, 3.4 * ceil(n / across))
    panels = list(figure.subplots(ceil(n / across), across, squeeze=False).flat)
    for unused in panels[n:]:
        unused.axis("off")
    return figure, panels[:n]


def _mean(grids: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    height, width = max(len(g) for g in grids), max(len(g[0]) for g in grids)
    found = [[[g[i][j] for g in grids if i < len(g) and j < len(g[0])] for j in range(width)] for i in range(height)]
    return [[sum(values) / len(values) if values else nan for values in row] for row in found]


def _chance(found: Overlaps, role: str) -> float:
    values = [s.chance for s in found.sites if s.role == role and s.chance is not None]
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------------------------------- of one adapter
def amplification_plot(found: Amplifications, png: str | Path) -> Path:
    """The factor of every weight and its two controls, on a logarithmic scale; what is infinite is left out, and counted."""
    figure = canvas(9, 4.5)
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    shown = (("factor", "update's directions", "o"), ("factor_random", "random directions", "x"), ("factor_weight", "W's strongest", "."))
    for key, label, marker in shown:
        points = [(i, value) for i, s in enumerate(found.sites) if (value := s.factors[key]) and isfinite(value)]
        axes.plot([i for i, _ in points], [v for _, v in points], marker, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")  # 20 and 0.05, not powers of ten
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(ylabel="‖ΔW‖ / ‖UᵀWV‖", xlim=(-0.5, len(found.sites) - 0.5))
    _name_weights(axes, [s.name for s in found.sites])
    _headed(figure, f"amplification by {found.adapter}", *_without_factor(found))
    figure.legend(loc="outside lower center", ncols=len(shown))
    return saved(figure, png)


def _without_factor(found: Amplifications) -> list[str]:
    zero = sum(not s.rank for s in found.sites)
    infinite = sum(s.factors["factor"] == inf for s in found.sites)
    counts = (("no update", zero), ("an infinite factor (W does nothing along the update)", infinite))
    return [f"{what}: {n} of {_weights(len(found.sites))}" for what, n in counts if n]


def spectra_plot(found: Spectra, png: str | Path) -> Path:
    """The share of Σσ² in the first k directions, a line a weight, early layers dark; and where W was looked at, the intruders."""
    counted = [s for s in found.sites if s.cosines is not None]
    figure = canvas(11 if counted else 7, 4.5)
    left, *right = figure.subplots(1, 2) if counted else [figure.subplots()]
    layers = sorted({s.layer for s in found.sites if s.layer is not None})
    for s in found.sites:
        shares = _shares(s.singular_values)
        left.plot(range(1, len(shares) + 1), shares, ".-", color=layer_color(s.layer, layers), linewidth=1, markersize=DOT, alpha=0.7)
    count_from_one(left, max(len(s.singular_values) for s in found.sites))
    left.axhline(SHARE, color="gray", linestyle=":")
    left.set(xlabel="k", ylabel="share of Σσ² in the first k", ylim=(0, 1.05))
    drawn = sum(bool(s.singular_values) for s in found.sites)
    left.set_title(f"updates of {_weights(drawn)}, early layers dark; dotted: {100 * SHARE:.0f} %", fontsize=10)
    for axes in right:
        axes.bar(range(len(counted)), [float(s.figures["intruders"] or 0) for s in counted], color="C3")
        most = max(len(s.cosines or ()) for s in counted)
        in_all = sum(int(s.figures["intruders"] or 0) for s in counted)
        axes.set(ylabel="intruder dimensions", ylim=(0, most))
        axes.set_title(f"{in_all} in all, among the {most} strongest directions of each", fontsize=10)
        axes.locator_params(axis="y", integer=True)
        _name_weights(axes, [s.name for s in counted])
    _headed(figure, f"spectra of {found.name}")
    return saved(figure, png)


def _shares(values: Sequence[float]) -> list[float]:
    squares = [value**2 for value in values]
    return [part / sum(squares) for part in accumulate(squares)]


def _name_weights(axes: Any, names: Sequence[str]) -> None:
    """The ends of their names, of as many weights as fit side by side; of more the number."""
    if len(names) <= LEGIBLE:
        axes.set_xticks(range(len(names)), [".".join(name.split(".")[-4:]) for name in names], rotation=90, fontsize=6, parse_math=False)
    else:
        axes.set_xlabel("weight, in the model's order")
