"""A run's records: rows of metrics that survive a kill, the curve drawn from them, and the line that moves while it runs."""

import json
import math
import numbers
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from rich import progress
from rich.console import Console

from lorakit.core.errors import BadParameter, DataError, MissingExtra
from lorakit.train.memory import used_bytes

Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------- the rows
class MetricsLog:
    """An append-only file of one JSON object a line, each with its `step`.

    A row is one line and leaves the process as it is appended, so that `kill -9` costs at most a torn last line, which readers skip and
    the next opening cuts off. `sync` makes the rows outlive the machine too; `truncate` drops those that a resumed run will redo.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._cut(_whole_lines(self.path))
        self._file = self.path.open("a", buffering=1, encoding="utf-8", newline="\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row: `step` and numbers, strings or None. Scalars of torch and numpy are unpacked; NaN and infinities become null."""
        if not isinstance(row.get("step"), int):
            raise BadParameter(f"a row of metrics needs an integer 'step', got {dict(row)}")
        self._file.write(json.dumps({k: _plain(k, v) for k, v in row.items()}, allow_nan=False) + "\n")

    def rows(self) -> list[Row]:
        """Every row so far."""
        return read_log(self.path)

    def sync(self) -> None:
        """Return when everything appended is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate(self, step: int) -> None:
        """Cut the file before the first row of a later step than `step`: the run goes on from there."""
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if json.loads(line)["step"] > step:
                break
            kept += len(line)
        self._cut(kept)
        self.sync()

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cut(self, size: int) -> None:
        if size < self.path.stat().st_size:
            os.truncate(self.path, size)


def read_log(path: str | Path) -> list[Row]:
    """The rows of a metrics file, which may be in writing: a torn last line is left out, a broken one before it is an error."""
    lines = Path(path).read_bytes()[: _whole_lines(Path(path))].splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise DataError(f"{path}, line {number}: not a JSON row: {line[:60]!r}") from e
    return rows


def _whole_lines(path: Path) -> int:
    """Bytes up to and including the last line break: what was written whole."""
    return path.read_bytes().rfind(b"\n") + 1


def _plain(key: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise BadParameter(f"a metric must be one number, a string or None; {key!r} is a {type(value).__name__}") from e
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------------------------- the curve
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
    return _replace(Path(png), lambda partial: figure.savefig(partial, format="png", dpi=120))


def _points(rows: list[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _draw(axes: Any, points: list[tuple[int, float]], label: str, color: str, linestyle: str = "-") -> None:
    if points:
        marker = "." if len(points) < 30 else None  # a single evaluation has no line, so it needs a dot
        axes.plot(*zip(*points, strict=True), label=label, color=color, linestyle=linestyle, marker=marker)


def _replace(path: Path, write: Callable[[Path], None]) -> Path:
    """Write beside `path`, then move over it: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    return partial.replace(path)


# ------------------------------------------------------------------------------------------------------- the line that moves
WINDOW = 50
"""Steps that the time left is judged by: long enough to be calm, short enough to follow a change."""


class Progress:
    """Steps done, loss, tokens a second, memory and time left: a bar on a terminal, else silent, or a plain line every `every` steps.

        with Progress(1000, start=200) as progress:
            progress.advance(loss=2.31, tokens_per_second=4096.0)

    Args:
        total: the run's last step.
        start: the step that the run starts or resumes after.
        every: without a terminal, print a line whenever the step is a multiple of this, and at the last step; None prints nothing.
        quiet: show nothing at all, as every process but the first does.
        console: where to write; None for standard error.
    """

    def __init__(
        self, total: int, *, start: int = 0, every: int | None = None, quiet: bool = False, console: Console | None = None
    ) -> None:
        self.total, self.step = total, start
        self.every = None if quiet else every
        self.console = console or Console(stderr=True)
        self._times = deque([time.monotonic()], maxlen=WINDOW)
        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[status]}"))
        self._bar = progress.Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self._task = self._bar.add_task("train", total=total, completed=start, status="")

    def advance(self, *, loss: float, tokens_per_second: float | None = None, memory: int | None = None) -> None:
        """One more step is done. `memory` in bytes; None for `used_bytes()`."""
        self.step += 1
        self._times.append(time.monotonic())
        parts = [f"loss {loss:.4f}"]
        parts += [] if tokens_per_second is None else [f"{tokens_per_second:,.0f} tok/s"]
        parts += [f"{(used_bytes() if memory is None else memory) / 1e9:.2f} GB", f"ETA {_clock(self.seconds_left())}"]
        self._show("  ".join(parts))

    def seconds_left(self) -> float:
        """Time to the last step at the pace of the last ones."""
        pace = (self._times[-1] - self._times[0]) / max(1, len(self._times) - 1)  # seconds a step
        return pace * (self.total - self.step)

    def _show(self, status: str) -> None:
        if not self._bar.disable:
            self._bar.update(self._task, completed=self.step, status=status)
        elif self.every and (self.step % self.every == 0 or self.step == self.total):
            self.console.print(f"step {self.step}/{self.total}  {status}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}"
