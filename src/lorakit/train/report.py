"""report.html: what a run was, how it went and what became of it, as one file that needs nothing from elsewhere.

It is written anew while the run goes on (never more than SHARE of its time), so that one that is killed has a page too, and once more at
the end with the held-out figures of the base beside the adapter's, and some held-out rows answered by both (train/answers.py).
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.core.errors import one_line
from lorakit.train import page
from lorakit.train.answers import Sample
from lorakit.train.chart import Chart, Line, chart, curve
from lorakit.train.facts import Facts, Pairs, now, word
from lorakit.train.log import Row, read_log
from lorakit.train.page import duration, figure, render, size, spelled
from lorakit.train.runs import newest

NAME = "report.html"
SHARE, PAUSE = 0.02, 3.0
"""Of the run's time that refreshing may take, and the seconds between two refreshes at least."""
SITES = 600
"""Sites that are listed at most."""
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What is known at the end. `base`: the figures with the adapter disabled; `compared`: the adapter's on the same items."""

    final: Figures
    steps: int
    seconds: float
    base: Figures = field(default_factory=dict)
    compared: Figures = field(default_factory=dict)
    base_note: str = ""
    samples: list[Sample] = field(default_factory=list)
    samples_note: str = ""
    memory: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    borders: Sequence[Sequence[Figures]] = ()
    adapter_bytes: int = 0
    expected: list[tuple[str, int]] = field(default_factory=list)
    """As `memory`, what was foreseen from shapes alone."""


@dataclass
class Report:
    """The page of one run. Called with each recorded row, it refreshes the page when there is time for it."""

    out: Path
    facts: Facts
    notes: list[str] = field(default_factory=list)
    _next: float = 0.0

    def __call__(self, row: Row) -> None:
        """A row was recorded."""
        began = time.monotonic()
        if began < self._next:
            return
        try:
            self.write()
        except Exception as error:  # a full disk, say: the run goes on, and its page is tried again when it has ended
            self.notes.append(f"{NAME} was not refreshed: {one_line(error)}")
            self._next = math.inf
            return
        done = time.monotonic()
        self._next = done + max(PAUSE, (done - began) / SHARE)

    def write(self, outcome: Outcome | None = None) -> Path:
        """Write the page; without an outcome, of a run that is not finished."""
        text = page_of(self.facts, read_log(self.out / "metrics.jsonl"), outcome, self.notes)
        return page.write(self.out / NAME, text)


# ------------------------------------------------------------------------------------------------------------------- the page
def page_of(facts: Facts, rows: Sequence[Row], outcome: Outcome | None, notes: Sequence[str] = ()) -> str:
    """The HTML of a run."""
    last = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=0)
    return render(
        "report.html.jinja",
        facts=facts,
        outcome=outcome,
        state=_state(facts, outcome, last),
        written=now(),
        tiles=_tiles(facts, rows, outcome),
        figures=compared(outcome.base, outcome.compared or outcome.final) if outcome else [],
        tied=bool(outcome and _tied(outcome.base)),
        charts=charts(rows, facts.ends, outcome.base.get("loss") if outcome and not facts.ends[1:] else None, counted=facts.counted),
        memory=_memory(rows, outcome),
        tasks=_tasks(facts.sources, outcome.borders) if outcome else [],
        notes=list(dict.fromkeys(outcome.notes if outcome else notes)),
        commands=usage(facts) if outcome else [],
        sites=facts.sites[:SITES],
    )


def _state(facts: Facts, outcome: Outcome | None, last: int) -> str:
    if outcome is None:
        return f"at step {last:,} of {facts.total:,} when this page was written"
    early = f", stopped early: {facts.total:,} were planned" if outcome.steps < facts.total else ""
    return f"finished after {outcome.steps:,} steps{early}"


def _tiles(facts: Facts, rows: Sequence[Row], outcome: Outcome | None) -> list[tuple[str, Any, str]]:
    """(what, number or words, remark) of the figures at the head of the page."""
    found: list[tuple[str, Any, str]] = []
    final: Figures = outcome.final if outcome else newest(rows)
    for key in ("loss", "accuracy", "bits_per_byte", "forgetting", "margin", "entity_f1", "macro_f1"):
        if key in final and len(found) < 3:
            base = _untied(outcome.base).get(key) if outcome and not outcome.compared else None
            found.append((words(key), final[key], "" if base is None else f"base {figure(base)}"))
    share = 100 * facts.trainable / max(1, facts.of)
    found.append(("trained parameters", facts.trainable, f"{share:.2g} % of {facts.of:,}"))
    if outcome:
        found.append(("time", duration(outcome.seconds), f"{outcome.steps:,} steps"))
        if outcome.adapter_bytes:
            found.append(("adapter on disk", size(outcome.adapter_bytes), ""))
    speeds = [y for _, y in curve(rows, "tokens_per_second") if math.isfinite(y)]
    if speeds:
        median = statistics.median(speeds)
        found.append((f"{facts.counted} a second", round(median) if median >= 10 else median, "median"))
    return found


def words(key: str) -> str:
    """A figure's name as people write it."""
    return "held-out loss" if key == "loss" else spelled(key)


def compared(base: Figures, final: Figures) -> list[tuple[str, float | None, float | None, float | None]]:
    """(name, base, adapter, difference) of each held-out figure."""
    found, known = [], _untied(base)
    for key in dict.fromkeys([*final, *base]):
        a, b = known.get(key), final.get(key)
        found.append((words(key), a, b, None if a is None or b is None else b - a))
    return found


def _tied(base: Figures) -> bool:
    """Whether the base was its own reference: all its rewards are 0, so that it prefers nothing."""
    return base.get("reward_chosen") == base.get("reward_rejected") == 0.0


def _untied(base: Figures) -> Figures:
    """Without the accuracy of what prefers nothing, which is no figure of 0."""
    return {key: value for key, value in base.items() if key != "accuracy"} if _tied(base) else base


_SERIES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "{counted} a second",
    "memory": "Memory",
}
"""Key in the rows -> title."""
_KNOWN = {"step", "loss", "eval_loss", "epoch", "tokens", "task", "final", *_SERIES}
OTHERS = 8
"""Figures of methods and of evaluations that get a picture of their own, at most."""


def charts(rows: Sequence[Row], ends: Sequence[int] = (), base: float | None = None, *, counted: str = "tokens") -> list[Chart]:
    """Every figure of a run over its steps: losses first, then what a step has, then evaluations and what the method adds. `counted`: what
    the speed counts."""
    borders = list(ends[:-1])
    level = None if base is None else (base, f"base {figure(base)}")
    found = [chart("Loss", _both(rows, "loss"), level=level, marks=borders, best=True)]
    for key, title in _SERIES.items():
        points, title = curve(rows, key), title.format(counted=counted.capitalize())
        if key == "memory":
            unit, name = _unit(max((y for _, y in points if math.isfinite(y)), default=0.0))
            points, title = [(x, y / unit) for x, y in points], f"Memory ({name})"
        found.append(chart(title, [Line("", points, 2)], marks=borders))
    keys = dict.fromkeys(key.removeprefix("eval_") for row in rows for key in row if key not in _KNOWN)
    others = (chart(_title(words(key)), _both(rows, key), marks=borders) for key in keys)
    drawn = (c for c in others if c and any("L" in line.path for line in c.lines))  # a single value is among the figures
    return [c for c in found if c] + list(islice(drawn, OTHERS))


def _both(rows: Sequence[Row], key: str) -> list[Line]:
    """A figure of the training batches, and of the held-out rows."""
    return [Line("training", curve(rows, key), 0), Line("held-out", curve(rows, f"eval_{key}"), 1)]


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _unit(largest: float) -> tuple[float, str]:
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")


def _memory(rows: Sequence[Row], outcome: Outcome | None) -> list[tuple[str, int, float]]:
    """(what, bytes, per cent of the largest) of the memory's parts, the measured peak first, what was expected after it."""
    peak = int(max((y for _, y in curve(rows, "memory") if math.isfinite(y)), default=0))
    parts = [("highest measured", peak)] if peak else []
    parts += [*outcome.expected, *outcome.memory] if outcome else []
    largest = max((n for _, n in parts), default=0)
    return [(what, n, 100 * n / max(1, largest)) for what, n in parts]


def _tasks(sources: Sequence[str], borders: Sequence[Sequence[Figures]]) -> list[tuple[str, float, float, float]]:
    """(data, loss when learned, loss now, difference) of tasks in sequence."""
    if not borders:
        return []
    now = borders[-1]
    rows = zip(sources, range(len(now)), strict=False)
    return [(source, borders[i][i]["loss"], now[i]["loss"], now[i]["loss"] - borders[i][i]["loss"]) for source, i in rows]


def usage(facts: Facts) -> Pairs:
    """What one does next."""
    path = f"{dict(facts.provenance)['output folder']}/adapter"
    folder, loaded = word(path), f"os.path.expanduser({path!r})" if path.startswith("~") else repr(path)
    talk = [("talk to it", f"lorakit chat {folder}")] if facts.talks else []
    what = "continue a text" if facts.shape == "text" or facts.talks else "answer a prompt"
    say = [] if facts.shape in ("classify", "tag") else [(what, f"lorakit generate {folder} --prompt 'Once'")]
    return [
        *talk,
        *say,
        *(("measure it", f"lorakit eval {folder} {said}") for said in dict.fromkeys(facts.measured)),
        ("look into it", f"lorakit inspect {folder}"),
        ("merge it into a copy of the base", f"lorakit merge {folder} --out merged"),
        ("use it in Python", f"lorakit.load(model, {loaded})"),
    ]
