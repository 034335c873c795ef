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
from lorakit.train.page import duration, render, size
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
        charts=charts(rows, facts.ends, (outcome.base.get("loss") if outcome and not facts.ends[1:] else None)),
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
            base = outcome.base.get(key) if outcome and not outcome.compared else None
            found.append((words(key), final[key], "" if base is None else f"base {base:.4g}"))
    share = 100 * facts.trainable / max(1, facts.of)
    found.append(("trained parameters", facts.trainable, f"{share:.2g} % of {facts.of:,}"))
    if outcome:
        found.append(("time", duration(outcome.seconds), f"{outcome.steps:,} steps"))
        if outcome.adapter_bytes:
            found.append(("adapter on disk", size(outcome.adapter_bytes), ""))
    speeds = [y for _, y in curve(rows, "tokens_per_second") if math.isfinite(y)]
    if speeds:
        found.append(("tokens a second", round(statistics.median(speeds)), "median"))
    return found


def words(key: str) -> str:
    """A figure's name as people write it."""
    return "held-out loss" if key == "loss" else key.replace("_", " ").replace("f1", "F1")


def compared(base: Figures, final: Figures) -> list[tuple[str, float | None, float | None, float | None]]:
    """(name, base, adapter, difference) of each held-out figure."""
    found = []
    for key in dict.fromkeys([*final, *base]):
        a, b = base.get(key), final.get(key)
        found.append((words(key), a, b, None if a is None or b is None else b - a))
    return found


# (key in the rows, title, also shown where only it is there)
_SERIES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens a second",
    "memory": "Memory",
}
_KNOWN = {"step", "loss", "eval_loss", "epoch", "tokens", "task", "final", *_SERIES}
OTHERS = 8
"""Figures of methods and of evaluations that get a picture of their own, at most."""


def charts(rows: Sequence[Row], ends: Sequence[int] = (), base: float | None = None) -> list[Chart]:
    """Every figure of a run over its steps: losses first, then what a step has, then evaluations and what the method adds."""
    borders = list(ends[:-1])
    level = None if base is None else (base, "base")
    losses = [Line("training", curve(rows, "loss"), 0), Line("held-out", curve(rows, "eval_loss"), 1)]
    found = [chart("Loss", losses, level=level, marks=borders, best=True)]
    for key, title in _SERIES.items():
        points = curve(rows, key)
        if key == "memory":
            unit, name = _unit(max((y for _, y in points if math.isfinite(y)), default=0.0))
            points, title = [(x, y / unit) for x, y in points], f"Memory ({name})"
        found.append(chart(title, [Line("", points, 2)], marks=borders))
    keys = dict.fromkeys(key for row in rows for key in row if key not in _KNOWN)
    others = (chart(_title(key), [Line("", curve(rows, key), 3)], marks=borders) for key in keys)
    drawn = (c for c in others if c and "L" in c.lines[0].path)  # a single value is among the figures
    return [c for c in found if c] + list(islice(drawn, OTHERS))


def _title(key: str) -> str:
    name = key.removeprefix("eval_")
    return (words(name) if name == key else f"held-out {words(name)}").replace("_", " ").capitalize().replace("f1", "F1")


def _unit(largest: float) -> tuple[float, str]:
    return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")


def _memory(rows: Sequence[Row], outcome: Outcome | None) -> list[tuple[str, int, float]]:
    """(what, bytes, per cent of the largest) of the memory's parts, the measured peak first."""
    peak = int(max((y for _, y in curve(rows, "memory") if math.isfinite(y)), default=0))
    parts = [("highest measured, all of the process", peak)] if peak else []
    parts += outcome.memory if outcome else []
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
    say = [] if facts.shape in ("classify", "tag") else [("continue a text", f"lorakit generate {folder} --prompt 'Once'")]
    return [
        *talk,
        *say,
        *(("measure it", f"lorakit eval {folder} {said}") for said in dict.fromkeys(facts.measured)),
        ("look into it", f"lorakit inspect {folder}"),
        ("merge it into a copy of the base", f"lorakit merge {folder} --out merged"),
        ("use it in Python", f"lorakit.load(model, {loaded})"),
    ]
