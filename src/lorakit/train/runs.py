"""Runs on disk: found below folders, read in whatever state they are, and compared.

A run is a folder with run.json (what it was to be), metrics.jsonl (how it went) and, once it is finished, result.json. What cannot be read
is a run that is damaged, with the reason; nothing here raises for what a folder holds.
"""

import json
import math
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.core.errors import BadParameter, LorakitError, did_you_mean, one_line
from lorakit.train.chart import Chart, Line, chart, curve
from lorakit.train.log import Row, read_log
from lorakit.train.progress import COUNTED

RECORD, RESULT, METRICS = "run.json", "result.json", "metrics.jsonl"
LARGEST = {RECORD: 10_000_000, RESULT: 10_000_000, METRICS: 500_000_000}
"""Bytes of a file that is read."""
DEEPEST = 8
"""Folders inside each other that are searched."""
FRESH = 120.0
"""Seconds since the last row within which an unfinished run counts as running."""


@dataclass(frozen=True)
class Found:
    """One run. `figures` are the final held-out ones, or the newest; `problem` says what is damaged, or nothing."""

    folder: Path
    state: str
    config: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    steps: int | None = None
    trained: int | None = None
    seconds: float | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """As the configuration calls it, or the folder's."""
        return _text(self.config.get("run_name")) or self.folder.resolve().name

    @property
    def method(self) -> str:
        """That which was trained."""
        return _text(self.record.get("method")) or _text(self.config.get("method"))

    @property
    def model(self) -> str:
        """The base as it was named."""
        return _text(self.config.get("model"))

    @property
    def data(self) -> str:
        """The training data as they were named."""
        named = self.config.get("train_data")
        return named if isinstance(named, str) else ", ".join(map(str, named)) if isinstance(named, list | dict) else ""

    @property
    def started(self) -> str:
        """When, in UTC."""
        return _text(self.record.get("started"))

    @property
    def label(self) -> str:
        """The folder as it was found, which tells runs of the same name apart."""
        return str(self.folder)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the rows."""
        names = ("name", "state", "method", "model", "data", "steps", "trained", "seconds", "started", "problem")
        figures = {"figures": dict(self.figures), "base": dict(self.base)}
        return {"folder": str(self.folder), **{name: getattr(self, name) for name in names}, **figures, "config": dict(self.config)}


# -------------------------------------------------------------------------------------------------------------------- finding
def find(folders: Iterable[str | Path]) -> list[Found]:
    """Every run at or below the folders, each once, in the order of their paths. Raises BadParameter for a folder that is none."""
    found: dict[Path, Found] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise BadParameter(f"{folder} is no folder; give folders of runs, or folders above them")
        for path in _below(folder):
            found.setdefault(path.resolve(), read(path))
    return list(found.values())


def _below(folder: Path, depth: int = 0) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError:
        return
    names = {entry.name for entry in entries}
    if RECORD in names or {RESULT, METRICS} <= names:
        yield folder
        return
    if depth < DEEPEST:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):  # a link may lead in a circle
                yield from _below(Path(entry.path), depth + 1)


def read(folder: Path) -> Found:
    """The run in a folder."""
    problems: list[str] = []
    record, result = (_json(folder / name, problems) for name in (RECORD, RESULT))
    if not record and not problems:
        problems.append(f"{RECORD} is missing")
    rows = _rows(folder / METRICS, problems)
    config = record.get("config")
    if record and not isinstance(config, Mapping):
        problems.append(f"{RECORD} holds no configuration")
    steps = _count(result.get("steps"))
    last = max((row["step"] for row in rows if _count(row.get("step")) is not None), default=0)
    figures = _figures(result.get("final")) or newest(rows)
    if result and (steps is None or not isinstance(result.get("final"), Mapping)):
        problems.append(f"{RESULT} lacks steps or final figures")
    trained = _count(result.get("trainable_params"))
    return Found(
        folder,
        "damaged" if problems else "finished" if steps is not None else _unfinished(folder, last),
        config if isinstance(config, Mapping) else {},
        record,
        figures,
        _figures(result.get("base")),
        rows,
        last if steps is None else steps,
        _count(record.get("trainable_params")) if trained is None else trained,
        _finite(result.get("seconds")),
        "; ".join(problems),
    )


def _unfinished(folder: Path, last: int) -> str:
    try:
        age = time.time() - (folder / METRICS).stat().st_mtime
    except OSError:
        return "not started"
    return f"{'running' if age < FRESH else 'stopped'} at step {last:,}"


def _json(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """The object in a file; {} where there is none, or none that can be read, which is a problem."""
    if not path.is_symlink() and not path.exists():
        return {}
    try:
        _check(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {one_line(error)}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no JSON object")
        return {}
    return value


def _rows(path: Path, problems: list[str]) -> list[Row]:
    if not path.is_symlink() and not path.exists():
        return []
    try:
        _check(path)
        rows = read_log(path)
    except (OSError, ValueError, RecursionError, LorakitError) as error:
        problems.append(f"{path.name} cannot be read: {one_line(error)}")
        return []
    kept = [row for row in rows if isinstance(row, dict)]
    if len(kept) < len(rows):
        problems.append(f"{path.name} has {len(rows) - len(kept)} lines that are no JSON object")
    return kept


def _check(path: Path) -> None:
    """A plain file of a reasonable size: a pipe would never end."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is no plain file")
    if facts.st_size > LARGEST[path.name]:
        raise ValueError(f"it has {facts.st_size:,} bytes")


def newest(rows: Sequence[Row]) -> dict[str, float]:
    """The latest held-out figures among a run's rows."""
    judged = [row for row in rows if _finite(row.get("eval_loss")) is not None]
    return _figures({k.removeprefix("eval_"): v for k, v in judged[-1].items() if k.startswith("eval_")}) if judged else {}


def _figures(value: Any) -> dict[str, float]:
    found = {str(k): _finite(v) for k, v in value.items()} if isinstance(value, Mapping) else {}
    return {k: v for k, v in found.items() if v is not None}


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        return None
    return float(value)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


# -------------------------------------------------------------------------------------------------------------------- sorting
ORDERS = ("started", "name", "method", "model", "data", "steps", "trained", "seconds", "state")


def ordered(runs: Sequence[Found], by: str) -> list[Found]:
    """Sorted by a column or by a held-out figure; with a minus in front, from the largest. Runs without a value come last."""
    key, down = by.removeprefix("-"), by.startswith("-")
    figures = {name for run in runs for name in run.figures}
    if key not in ORDERS and key not in figures:
        raise BadParameter(f"cannot sort by {key!r}. {did_you_mean(key, [*ORDERS, *figures])}")

    def value(run: Found) -> Any:
        return getattr(run, key) if key in ORDERS else run.figures.get(key)

    known = [run for run in runs if value(run) not in (None, "")]
    return [*sorted(known, key=value, reverse=down), *(run for run in runs if value(run) in (None, ""))]


# ------------------------------------------------------------------------------------------------------------------ comparing
@dataclass(frozen=True)
class Comparison:
    """Runs side by side: figures (name, a value a run), the keys that differ (key, a value a run), and why figures may not compare."""

    runs: list[Found]
    figures: list[tuple[str, list[float | None]]]
    differing: list[tuple[str, list[Any]]]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "runs": [run.as_dict() for run in self.runs],
            "figures": dict(self.figures),
            "differing": dict(self.differing),
            "warnings": self.warnings,
        }


JUDGING = ("max_length", "packing", "train_on", "chat_template", "max_eval_samples", "dtype", "quantize", "beta")
"""Keys that change how held-out data are measured, not only what is learned."""
_MISSING = "–"


def compare(runs: Sequence[Found]) -> Comparison:
    """Compare two runs or more. Raises BadParameter for fewer."""
    if len(runs) < 2:
        there = "there is one run" if runs else "there are no runs"
        raise BadParameter(f"{there} to compare; give two folders of runs, or a folder above several")
    settings = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found)
    differing = [(key, [found.get(key, _MISSING) for found in settings]) for key in keys]
    names = dict.fromkeys(name for run in runs for name in run.figures)
    figures: list[tuple[str, list[float | None]]] = [(name, [run.figures.get(name) for run in runs]) for name in names]
    figures.append(("trained", [run.trained for run in runs]))
    figures.append(("seconds", [None if run.seconds is None else round(run.seconds) for run in runs]))
    figures.append(("steps", [run.steps for run in runs]))
    return Comparison(
        list(runs),
        [(name, values) for name, values in figures if any(v is not None for v in values)],
        [(key, values) for key, values in differing if any(_spelled(v) != _spelled(values[0]) for v in values)],
        _warnings(runs, settings),
    )


def _settings(run: Found) -> dict[str, Any]:
    own = run.config.get("method_args")
    return {k: v for k, v in run.config.items() if k != "method_args"} | (dict(own) if isinstance(own, Mapping) else {})


def _warnings(runs: Sequence[Found], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    hashes = [_text(run.record.get("held_out_hash")) for run in runs]
    unknown = [run.label for run, digest in zip(runs, hashes, strict=True) if not digest]
    if len(set(filter(None, hashes))) > 1:
        found.append("the runs were evaluated on different held-out data: their figures are not comparable")
    elif unknown:
        found.append(f"it is not known on which held-out data {', '.join(unknown)} was evaluated: figures may not be comparable")
    bases = {_spelled(_part(run.record.get("base"), "rows") or run.model) for run in runs}
    if len(bases) > 1:
        found.append(
            "the runs have different bases: losses and perplexities count tokens, so compare bits per byte, if the texts are the same"
        )
    for key in JUDGING:
        if len({_spelled(values.get(key)) for values in settings}) > 1:
            found.append(f"{key} differs, which changes how the held-out data are measured")
    for run in runs:
        if run.problem:
            found.append(f"{run.label} is damaged: {run.problem}")
        elif not run.state.startswith("finished"):
            found.append(f"{run.label} is not finished: its figures are the newest so far")
    return found


def _part(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


LINES = 16
"""Runs whose curves are drawn over each other at most."""
_CURVES = {
    "eval_loss": "Held-out loss",
    "loss": "Training loss",
    "eval_accuracy": "Held-out accuracy",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "{counted} a second",
}


def overlaid(runs: Sequence[Found]) -> list[Chart]:
    """The runs' curves over each other."""
    shown = list(enumerate(runs))[:LINES]
    counted = ", ".join(dict.fromkeys(COUNTED.get(_text(run.record.get("task")), "tokens") for _, run in shown)).capitalize()
    found = []
    for key, title in _CURVES.items():
        lines = [Line(run.label, curve(run.rows, key), i) for i, run in shown]
        found.append(chart(title.format(counted=counted), lines, best=key == "eval_loss"))
    return [c for c in found if c]
