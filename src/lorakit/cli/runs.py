"""`lorakit runs`: what was trained below some folders, and how runs compare."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

Folders = Annotated[list[str] | None, typer.Argument(help="folders of runs, or folders above them; default: here")]


def runs(
    folders: Folders = None,
    sort: Annotated[str, typer.Option("--sort", help="a column or a held-out figure; -loss sorts from the largest")] = "started",
    compare: Annotated[bool, typer.Option("--compare", help="figures side by side, and the configuration keys that differ")] = False,
    html: Annotated[str | None, typer.Option("--html", help="write a page with the curves over each other to this file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value, for programs")] = False,
) -> None:
    """List the runs below folders; --compare lays them side by side: lorakit runs --compare out/a out/b.

    Runs that are damaged are listed with the reason; nothing is changed.
    """
    from lorakit.train import runs as reading

    found = reading.ordered(reading.find(folders or ["."]), sort) if not compare else reading.find(folders or ["."])
    comparison = reading.compare(found) if compare else None
    if html is not None:
        _write(Path(html), found, comparison or (reading.compare(found) if len(found) > 1 else None))
    if as_json:
        return print(json.dumps(comparison.as_dict() if comparison else [run.as_dict() for run in found], indent=1, default=str))
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not found:
        return print(f"no runs below {', '.join(folders or ['.'])}: a run is a folder with run.json, as lorakit train leaves one")
    if comparison is None:
        console.print(listing(found))
        for run in found:
            if run.problem:
                console.print(_plain(f"damaged: {run.label}: {run.problem}"), soft_wrap=True)
    else:
        console.print(figures(comparison))
        console.print(differing(comparison))
        for warning in comparison.warnings:
            console.print(_plain(f"mind: {warning}"), soft_wrap=True)
    if html is not None:
        console.print(_plain(f"page: {html}"), soft_wrap=True)


def listing(found: list[Any]) -> Table:
    """A line a run."""
    judged = [name for name in ("loss", "accuracy") if any(name in run.figures for run in found)]
    words = [Column(name, overflow="fold") for name in ("run", "method", "model", "data")]
    numbers = [Column(name, justify="right", no_wrap=True) for name in (*judged, "steps", "trained", "seconds")]
    table = Table(*words, *numbers, Column("started", no_wrap=True), "state", box=None)
    for run in found:
        cells = [run.label, run.method, run.model, run.data, *(_figure(run.figures.get(name)) for name in judged)]
        seconds = "" if run.seconds is None else f"{run.seconds:.0f}"
        counts = ["" if count is None else f"{count:,}" for count in (run.steps, run.trained)]
        cells += [*counts, seconds, run.started.removesuffix(" UTC"), run.state]
        table.add_row(*map(_plain, cells))
    return table


def figures(comparison: Any) -> Table:
    """Held-out figures and cost, each with its difference from the first run's."""
    from lorakit.train.page import spelled

    table = Table("figure", *(Column(_plain(run.label), justify="right", overflow="fold") for run in comparison.runs), box=None)
    for name, values in comparison.figures:
        first = values[0]
        cells = [_figure(v) + ("" if v is None or first is None or i == 0 else f" ({_change(v - first)})") for i, v in enumerate(values)]
        table.add_row(spelled(name), *cells)
    return table


def differing(comparison: Any) -> Table:
    """The keys whose values differ."""
    table = Table(
        "key", *(Column(_plain(run.label), overflow="fold") for run in comparison.runs), box=None, title="configuration: what differs"
    )
    for key, values in comparison.differing:
        table.add_row(_plain(key), *(_plain(v if isinstance(v, str) else json.dumps(v, default=str)) for v in values))
    return table


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _change(value: float) -> str:
    return f"{value:+,}" if isinstance(value, int) else f"{value:+.4f}"


def _plain(text: Any) -> Text:
    """What a file said, as it is: no markup of its own, no control characters."""
    from lorakit.train.page import plain

    return Text(plain(text, 200))


def _write(path: Path, found: list[Any], comparison: Any) -> None:
    from lorakit.core.errors import BadParameter
    from lorakit.train import page
    from lorakit.train.facts import now
    from lorakit.train.runs import LINES, overlaid

    text = page.render("runs.html.jinja", runs=found, comparison=comparison, charts=overlaid(found), lines=LINES, written=now())
    try:
        page.write(path, text)
    except OSError as error:
        raise BadParameter(f"cannot write --html {path}: {error.strerror or error}") from None
