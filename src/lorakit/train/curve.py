"""The loss curve of a run as a picture; report.html draws its own (train/chart.py)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.core.errors import DataError, MissingExtra
from lorakit.train.log import replace_file

_LOSSES = (("loss", "train", "C0"), ("eval_loss", "eval", "C1"))


def draw_curve(rows: Iterable[Mapping[str, Any]], png: str | Path) -> Path:
    """Train and eval loss over steps, the learning rate on a second axis, as a PNG that replaces the old one in one go.

    Args:
        rows: as `MetricsLog` holds them; `loss`, `eval_loss` and `learning_rate` are drawn where a row has them.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: a figure of its own draws with Agg and touches no global state
    except ImportError as e:
        raise MissingExtra("matplotlib", "plot") from e
    rows = list(rows)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.add_subplot(xlabel="step", ylabel="loss")
    for key, label, color in _LOSSES:
        _draw(losses, _points(rows, key), label, color)
    if not losses.lines:
        raise DataError("no row has a loss or an eval_loss: nothing to draw")
    rates = losses.twinx()
    rates.set_ylabel("learning rate")
    _draw(rates, _points(rows, "learning_rate"), "learning rate", "C7", linestyle=":")
    figure.legend(loc="outside upper right", ncols=3)
    return replace_file(Path(png), lambda partial: figure.savefig(partial, format="png", dpi=120))


def _points(rows: list[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _draw(axes: Any, points: list[tuple[int, float]], label: str, color: str, linestyle: str = "-") -> None:
    if points:
        marker = "." if len(points) < 30 else None  # a single evaluation has no line, so it needs a dot
        axes.plot(*zip(*points, strict=True), label=label, color=color, linestyle=linestyle, marker=marker)
