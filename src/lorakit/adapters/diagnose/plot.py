"""The diagnostics as pictures, PNG files. Matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from itertools import accumulate
from math import ceil, isfinite, nan
from pathlib import Path
from typing import Any

from lorakit.adapters.diagnose.amplification import Amplifications
from lorakit.adapters.diagnose.distance import Distances
from lorakit.adapters.diagnose.spectrum import SHARE, Spectra
from lorakit.adapters.diagnose.subspace import Overlaps
from lorakit.core.errors import CheckpointError, MissingExtra

ACROSS = 4
"""Panels side by side."""


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


def layer_color(layer: int | None, layers: Sequence[int]) -> tuple[float, float, float]:
    """Dark blue for the first layer, light for the last."""
    shade = layers.index(layer) / max(1, len(layers) - 1) if layer is not None else 0.0
    return (0.1 + 0.5 * shade, 0.2 + 0.5 * shade, 0.5 + 0.4 * shade)


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


def _heat(figure: Any, axes: Any, values: Sequence[Sequence[float | None]], colors: str, low: float) -> Any:
    image = axes.imshow([[nan if v is None else v for v in row] for row in values], cmap=colors, vmin=low, vmax=1.0, aspect="auto")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return image


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
        image = _heat(figure, axes, mean, "viridis", 0.0)
        image.set_extent((0.5, len(mean[0]) + 0.5, len(mean) + 0.5, 0.5))  # i and j begin at 1
        axes.locator_params(integer=True)
        axes.set(xlabel="j", ylabel="i")
        axes.set_title(f"{role}: {len(grids)} weights, by chance {_chance(found, role):.3f}", fontsize=9)
    figure.suptitle(f"φ(i, j), {found.space} of {found.a} (i) and {found.b} (j)", parse_math=False)
    return saved(figure, png)


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
    values = [s.chance for s in found.sites if s.role == role and s.grid]
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------------------------------- of one adapter
def amplification_plot(found: Amplifications, png: str | Path) -> Path:
    """The factor of every weight and its two controls, on a logarithmic scale; what is infinite is left out."""
    figure = canvas(9, 4.5)
    axes = figure.subplots()
    shown = (("factor", "update's directions", "o"), ("factor_random", "random directions", "x"), ("factor_weight", "W's strongest", "."))
    for key, label, marker in shown:
        points = [(i, value) for i, s in enumerate(found.sites) if (value := s.factors[key]) and isfinite(value)]
        axes.plot([i for i, _ in points], [v for _, v in points], marker, label=label)
    axes.set_yscale("log")
    axes.set(ylabel="‖ΔW‖ / ‖UᵀWV‖", xlim=(-0.5, len(found.sites) - 0.5))
    _name_weights(axes, [s.name for s in found.sites])
    axes.set_title(f"amplification by {found.adapter}", parse_math=False)
    axes.legend()
    return saved(figure, png)


def spectra_plot(found: Spectra, png: str | Path) -> Path:
    """The share of Σσ² in the first k directions, a line a weight, early layers dark; and where W was looked at, the intruders."""
    counted = [s for s in found.sites if s.cosines is not None]
    figure = canvas(11 if counted else 7, 4.5)
    left, *right = figure.subplots(1, 2) if counted else [figure.subplots()]
    layers = sorted({s.layer for s in found.sites if s.layer is not None})
    for s in found.sites:
        shares = _shares(s.singular_values)
        left.plot(range(1, len(shares) + 1), shares, color=layer_color(s.layer, layers), linewidth=1, alpha=0.7)
    left.locator_params(axis="x", integer=True)
    left.axhline(SHARE, color="gray", linestyle=":")
    left.set(xlabel="k", ylabel="share of Σσ² in the first k", ylim=(0, 1.05))
    left.set_title(f"{len(found.sites)} updates, early layers dark", fontsize=10)
    for axes in right:
        axes.bar(range(len(counted)), [float(s.figures["intruders"] or 0) for s in counted], color="C3")
        axes.set(ylabel="intruder dimensions", ylim=(0, max(len(s.cosines or ()) for s in counted)))
        _name_weights(axes, [s.name for s in counted])
    figure.suptitle(f"spectra of {found.name}", parse_math=False)
    return saved(figure, png)


def _shares(values: Sequence[float]) -> list[float]:
    squares = [value**2 for value in values]
    return [part / sum(squares) for part in accumulate(squares)]


def _name_weights(axes: Any, names: Sequence[str]) -> None:
    """Of at most 30 weights the ends of their names; of more the number."""
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), [".".join(name.split(".")[-4:]) for name in names], rotation=90, fontsize=6, parse_math=False)
    else:
        axes.set_xlabel("weight, in the model's order")
