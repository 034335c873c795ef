"""`lorakit presets`: what suits a family of models, each value with its reason."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table


def presets(name: Annotated[str | None, typer.Argument(help="print this one: a file of keys that can be copied")] = None) -> None:
    """List the presets, or print one: lorakit presets llama. Take one with `lorakit train --preset llama`, or --preset auto."""
    from lorakit.train.preset import preset, presets

    if name is not None:
        return print(preset(name).text, end="")
    table = Table("name", Column("model types", overflow="fold"), Column("for", overflow="fold"), Column("keys", overflow="fold"), box=None)
    for found in presets().values():
        table.add_row(found.name, ", ".join(found.model_types), found.about, ", ".join(found.values))
    Console(width=140, markup=False).print(table)
