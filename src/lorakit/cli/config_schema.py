"""`lorakit config-schema`: every key of a configuration with its type, range, default and other names; or its JSON Schema."""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from lorakit.train.schema import Key


def config_schema(
    field: Annotated[str | None, typer.Option("--field", help="one key, by its name here or in LLaMA-Factory, axolotl or TRL")] = None,
    method: Annotated[str | None, typer.Option("--method", help="only this method's parameters")] = None,
    format: Annotated[Literal["json", "table"], typer.Option("--format", help="JSON Schema, or a table to read")] = "json",
) -> None:
    """Print the keys of a configuration: lorakit config-schema > lorakit.schema.json, or lorakit config-schema --field lora_rank.

    The schema holds other tools' keys too, with what they mean here, so an editor that is given it completes their files as well.
    """
    from lorakit.train.schema import config_schema, key_named, keys_of

    console = Console(soft_wrap=True, highlight=False, markup=False)
    if field is not None:
        key = key_named(field, method)
        if format == "table" or method is None:
            return show_key(key, field, console)
        return print(json.dumps(config_schema(method)["properties"][key.name], indent=2))
    if format == "json":
        return print(json.dumps(config_schema(method), indent=2, ensure_ascii=False))
    table = Table(
        "key",
        Column("type", overflow="fold"),
        "default",
        Column("meaning", overflow="fold"),
        Column("elsewhere", overflow="fold"),
        box=None,
    )

    for key in keys_of(method):
        elsewhere = ", ".join(dict.fromkeys(name for names in key.aliases.values() for name in names))
        table.add_row(key.name, key.kind, _default(key.default), (f"{key.method}: " if key.method else "") + key.about, elsewhere)
    Console(width=180, markup=False).print(table)


def show_key(key: "Key", asked: str, console: Console) -> None:
    """One key, a fact a line."""
    if asked != key.name:
        console.print(f"{asked} is {key.name} here")
    console.print(f"{key.name}: {key.about}")
    console.print(f"  type     {key.kind}")
    console.print(f"  default  {_default(key.default)}")
    if key.method:
        console.print(f"  of       method {key.method}")
    for title, names in key.aliases.items():
        console.print(f"  {title}: {', '.join(names)}")


def _default(value: object) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
