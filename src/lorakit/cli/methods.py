"""Commands that read the registry and add to it: `list`, `show`, `new-method`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from lorakit.cli import scaffold

WIDTH = 140  # of what is piped or captured: the length of our source lines


def list_(as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False) -> None:
    """List the registered methods. Each with its id, paper, survey section, heading, kind, and its parameters with their defaults."""
    from lorakit.cli import page
    from lorakit.core.method import describe, list_methods

    entries = sorted(map(describe, list_methods()), key=lambda e: (e.survey, e.heading, e.name))
    if as_json:
        print(json.dumps([e.as_dict() for e in entries], ensure_ascii=False, indent=2))
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("id", "paper", "survey", "heading", "kind"):
        table.add_column(title, no_wrap=True)
    table.add_column("parameters", overflow="fold")
    for e in entries:
        table.add_row(e.name, e.paper, e.survey, e.heading, e.kind, page.parameters(e))
    _console().print(table)


def show(method: Annotated[str, typer.Argument(metavar="METHOD", help="A method's id, as `lorakit list` prints it, or `a+b`.")]) -> None:
    """Show one method. The paper's equations, then the code, then the resolved parts at its defaults."""
    from lorakit.cli import page
    from lorakit.core.method import describe, get_method

    entry = describe(method)
    console = _console()
    console.rule(f"[bold]{entry.name}[/bold]: {entry.paper}, survey {entry.survey}, {entry.heading}, {entry.kind}", align="left")
    console.print(page.paper(entry), markup=False, highlight=False, soft_wrap=True)
    console.rule(f"code: {', '.join(page.source_line(one.make) for one in page.members(entry))}", align="left")
    console.print(Syntax(page.code(entry), "python", theme="ansi_dark", background_color="default"))
    console.rule(f"parts of get_method({entry.name!r})", align="left")
    for name, value in page.parts(get_method(entry.name)).items():
        console.print(f"{name} = {page.spelled(value)}", markup=False, soft_wrap=True)
        if dataclasses.is_dataclass(value):
            console.print(f"    {page.source_line(type(value))}", style="dim", markup=False, highlight=False, soft_wrap=True)


def new_method(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The id: lower-case letters, digits and '_'.")],
    heading: Annotated[str, typer.Option(help=f"The survey's heading: {', '.join(scaffold.HEADINGS)}.")] = "learning",
    root: Annotated[Path, typer.Option(help="A checkout of lorakit; elsewhere a plugin module is written.")] = Path("."),
) -> None:
    """Write the two files of a new method. The method itself, and the test in its mirror; they pass every law as they are."""
    for line in scaffold.write(name, heading, root):
        print(line)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
