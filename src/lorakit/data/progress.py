"""A bar on standard error while something long is done to rows; nothing without a terminal, or in any process but the first."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def advancing(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A function to be called with how many more of `total` rows are done."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal or os.environ.get("RANK", "0") != "0"
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("rows"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
