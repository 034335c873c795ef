"""Line charts for a page without scripts: each is an SVG that stretches, between labels of HTML that keep their size.

A line is points (x, y); NaN and infinities leave a gap. Positions are per mille of the plot from its left and its bottom edge.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Point = tuple[float, float]
LIMIT = 1000
"""Points of a line that are drawn at most: a screen is not much wider."""
DOTS = 30
"""Up to so many points each gets a dot: a single evaluation has no line."""


@dataclass(frozen=True)
class Line:
    """One curve. `color` is its number in the page's palette."""

    name: str
    points: Sequence[Point]
    color: int = 0


@dataclass(frozen=True)
class Drawn:
    """A line as the page writes it: an SVG path each for the strokes and the dots, and what the legend says of it."""

    name: str
    color: int
    path: str
    dots: str
    said: str


@dataclass(frozen=True)
class Chart:
    """Some lines over one axis, laid out. Ticks are (per mille, label)."""

    title: str
    lines: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    level: tuple[float, str] | None = None
    """A horizontal line: what the base had before training."""
    marks: list[float] = field(default_factory=list)
    """Vertical lines: the borders between tasks."""

    @property
    def summary(self) -> str:
        """What the picture shows, in words, for those who do not see it."""
        return f"{self.title}: " + "; ".join(f"{line.name} {line.said}" for line in self.lines)


def chart(
    title: str, lines: Sequence[Line], *, level: tuple[float, str] | None = None, marks: Sequence[float] = (), best: bool = False
) -> Chart | None:
    """Lay out the lines that have a finite point; None where none has. `best`: the legend names each line's lowest value too."""
    kept = [(line, [p for p in line.points if finite(p)]) for line in lines]
    points = [p for _, found in kept for p in found]
    if not points:
        return None
    level = level if level is not None and math.isfinite(level[0]) else None
    ys = [y for _, y in points] + ([level[0]] if level else [])
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    if 0 < x_low <= 0.2 * x_high:  # steps from the run's beginning on
        x_low = 0.0
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_ticks = ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return 1000 * (x - x_low) / (x_high - x_low), 1000 * (y - y_low) / (y_high - y_low)

    drawn = []
    for line, found in kept:
        if found:
            placed = [at(x, y) if math.isfinite(y) else None for x, y in thinned(line.points)]
            dots = "".join(f"M{p[0]:.1f} {1000 - p[1]:.1f}h.01" for p in placed if p) if len(found) <= DOTS else ""
            drawn.append(Drawn(line.name, line.color, _path(placed), dots, _said(found, best)))
    x_shown = [x for x in ticks(x_low, x_high, 5, whole=True) if x_low <= x <= x_high]
    return Chart(
        title,
        drawn,
        [(at(x, y_low)[0], label) for x, label in zip(x_shown, labels(x_shown), strict=True)],
        [(at(x_low, y)[1], label) for y, label in zip(y_ticks, labels(y_ticks), strict=True)],
        (at(x_low, level[0])[1], level[1]) if level else None,
        [at(x, y_low)[0] for x in marks if x_low < x < x_high],
    )


def curve(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of a figure in a run's rows; a null, which was no finite number, is NaN, and what is no number is left out."""
    found = [(row.get("step"), row.get(key, "")) for row in rows]
    return [(float(x), math.nan if y is None else float(y)) for x, y in found if _number(x) and (y is None or _number(y))]  # type: ignore[arg-type]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # beyond, a range has no width


def finite(point: Point) -> bool:
    """Whether a point can be drawn."""
    return math.isfinite(point[0]) and math.isfinite(point[1])


def thinned(points: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """At most about `limit` of the points, in order: the first, the last, and of each stretch the lowest and the highest, so that no spike
    is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = [i for i, p in enumerate(stretch) if finite(p)]
        if ends:
            pair = {min(ends, key=lambda i: stretch[i][1]), max(ends, key=lambda i: stretch[i][1])}
            kept += [stretch[i] for i in sorted(pair)]
        else:
            kept.append(stretch[0])
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """Round numbers from one at or below `low` to one at or above `high`: some `count` steps of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = 0.1 * abs(high) or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks in as few digits as tell them apart."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    largest = max(map(abs, values), default=0.0)
    if largest >= 1e4:
        unit, name = next((u, n) for u, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= u)
        return ["0" if v == 0 else minus(f"{v / unit:.{_digits(step / unit)}f}{name}") for v in values]
    if largest < 1e-3:
        return ["0" if v == 0 else _scientific(v) for v in values]
    return [minus(f"{v:.{_digits(step)}f}") for v in values]


def minus(text: str) -> str:
    """A number with a true minus in front, if it has one."""
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _digits(step: float) -> int:
    return max(0, min(6, -math.floor(math.log10(step) + 1e-9))) if step > 0 else 0


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return minus(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}")


def brief(value: float) -> str:
    """A number in about four digits, with a true minus: 1.230, 12,345, 2.5e-4, −0.0226."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return minus(f"{value:,.0f}") if abs(value) < 1e9 else _scientific(value)
    if abs(value) < 1e-3:
        return _scientific(value)
    return minus(f"{value:#.4g}".rstrip(".") if abs(value) >= 1 else f"{value:.4f}")


def _said(points: Sequence[Point], best: bool) -> str:
    lowest = min(points, key=lambda p: p[1])
    words = brief(points[-1][1])
    return f"{words} (lowest {brief(lowest[1])} at step {lowest[0]:,.0f})" if best and lowest[1] < points[-1][1] else words


def _path(placed: Sequence[tuple[float, float] | None]) -> str:
    """Strokes through the points, broken where one is None."""
    words, pen = [], "M"
    for p in placed:
        if p is None:
            pen = "M"
        else:
            words.append(f"{pen}{p[0]:.1f} {1000 - p[1]:.1f}")
            pen = "L"
    return "".join(words)
