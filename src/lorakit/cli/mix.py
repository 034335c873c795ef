"""`lorakit mix`: several adapters to one."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from lorakit.cli.flags import parse_flags
from lorakit.core.errors import BadParameter

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def mix(
    ctx: typer.Context,
    out: Annotated[str | None, typer.Option("--out", help="new folder")] = None,
    how: Annotated[str, typer.Option("--how", help="a mixer; --list shows them and their options")] = "linear",
    space: Annotated[
        str, typer.Option("--space", help="delta, core, knots, factor (inexact), each with +svd:Q to cut the result to rank Q")
    ] = "delta",
    recipe: Annotated[str | None, typer.Option("--recipe", help="YAML file with a tree of mixes in place of folders and flags")] = None,
    model: Annotated[str | None, typer.Option("--model", help="folder of the base, to read adapters that PEFT wrote")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    force: Annotated[bool, typer.Option("--force", help="also for other bases and without common sites")] = False,
    listed: Annotated[bool, typer.Option("--list", help="list the mixers")] = False,
) -> None:
    """Mix finished adapters: lorakit mix --how ties a/ b/ --weights 0.7 0.3 --density 0.2 --out c/

    One weight an adapter, of any sign. A mixer's own options are flags, too; regmean and fisher need --stats with a file for each adapter,
    which `lorakit statistics` writes.
    """
    if listed:
        return print_mixers()
    from lorakit.adapters.io import save_adapter
    from lorakit.adapters.mix.recipe import Mix, made, read_recipe
    from lorakit.serve.open import base_of
    from lorakit.serve.statistics import load_statistics

    folders, options = parsed(ctx.args)
    if recipe is not None:
        if folders or options:
            raise BadParameter(f"a recipe says everything; besides it were given: {' '.join(ctx.args)}")
        tree, stats = read_recipe(recipe), None
    else:
        weights, stats = options.pop("weights", None), [load_statistics(path) for path in options.pop("stats", [])] or None
        tree = Mix(how=how, of=list(folders), space=space, seed=seed, weights=weights, options=options)
    if out is None:
        raise BadParameter("where the result goes is missing: give --out FOLDER")
    adapter = made(tree, load=lambda folder: _loaded(folder, model, base_of), force=force, stats=stats)
    save_adapter(adapter, out)
    print_result(adapter.meta["mix"], len(adapter.sites))
    print("adapter:", out)


def _loaded(folder: str, model: str | None, base_of: Any) -> Any:
    from lorakit.adapters.io import load_adapter

    return load_adapter(folder, model=base_of(folder, model, needed=False), lazily=True)


def parsed(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(folders, options): --weights takes all numbers that follow it, --stats all files, every other flag one value."""
    folders, options = list[str](), dict[str, Any]()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            folders.append(word)
            continue
        key, given, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if key in SEVERAL and not given:
            options[key] = []
            while rest and not rest[0].startswith("--") and (one := SEVERAL[key](rest[0])) is not None:
                options[key].append(one)
                rest.pop(0)
            if not options[key]:
                raise BadParameter(f"{word} is followed by nothing that it takes; expected one for each adapter, as in --weights 0.7 0.3")
        elif not given and not rest:
            raise BadParameter(f"{word} has no value")
        else:
            options |= parse_flags([f"--{key}={value if given else rest.pop(0)}"])
    return folders, options


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


SEVERAL: dict[str, Callable[[str], Any]] = {"weights": _number, "stats": str}
"""Flags that take more than one value, and what makes a value of a word; None: it is none."""


def print_result(record: dict[str, Any], sites: int) -> None:
    """What was done, and how exactly."""
    lost = record["lost"]
    inexact = ", which makes cross terms B_i A_j: not Σ w ΔW" if record["space"].startswith("factor") else ""
    print(f"{record['how']} of {len(record['sources'])} adapters at {sites} sites, in {record['space']} space{inexact}")
    if lost["total"]:
        print(f"cut off: {100 * lost['total']:.2f} % of the norm, {100 * lost['worst']:.2f} % at {lost['where']}")
    else:
        print("nothing was cut off")


def print_mixers() -> None:
    """All of them, with their options."""
    from rich.console import Console
    from rich.table import Table

    from lorakit.adapters.mix.mixers import MIXERS

    table = Table("mixer", "options", "what it does", "source", box=None)
    for name, mixer in MIXERS.items():
        options = ", ".join(f"{key}={value}" for key, value in mixer.options.items())
        table.add_row(name, options, mixer.summary, mixer.paper)
    Console(width=150).print(table)
