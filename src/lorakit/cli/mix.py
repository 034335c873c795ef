"""`lorakit mix`: several adapters to one."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.flags import parse_flags
from lorakit.core.errors import AdapterMismatch, BadParameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.adapters.mix.recipe import Mix
    from lorakit.core.adapter import Adapter

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
    into_base: Annotated[
        bool, typer.Option("--into-base", help="write a whole model, the mixture in its weights: nothing is cut off")
    ] = False,
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
    from lorakit.adapters.mix.recipe import made, read_recipe

    folders, options = parsed(ctx.args)
    if recipe is not None:
        _check_alone(ctx)
        tree, stats = read_recipe(recipe), None
    else:
        stats = _statistics(how, options.pop("stats", []))
        tree = _tree(how, folders, options.pop("weights", None), space, seed, options)
    _check(tree)
    _check_out(out, tree)
    bases = dict[str | None, Any]()
    if into_base:
        return _into_base(tree, Path(str(out)), model, lambda folder: _loaded(folder, model, bases), force, stats)
    adapter = made(tree, load=lambda folder: _loaded(folder, model, bases), force=force, stats=stats)
    save_adapter(adapter, str(out))
    print_result(adapter.meta["mix"], len(adapter.sites))
    print("adapter:", out)


def _into_base(tree: "Mix", out: Path, model: str | None, load: "Callable[[str], Adapter]", force: bool, stats: Any) -> None:
    """In the dtype that the first adapter was trained beside, with its chat template; `mix.json` says how it was made."""
    import json

    import torch

    from lorakit.adapters.mix.recipe import made_into
    from lorakit.serve.merge import check_new, new_folder, save_model
    from lorakit.serve.open import base_of, recorded
    from lorakit.train.source_model import load_tokenizer

    check_new(out)
    first = next(_folders(tree))
    facts = recorded(first)
    name, base = model or facts.get("model"), base_of(first, model, needed=True)
    if base is None or name is None:
        raise BadParameter(f"the adapter {first} does not name its base; give it with --model")
    record = made_into(tree, base, load=load, force=force, stats=stats)
    with new_folder(out) as partial:
        save_model(
            base.to(getattr(torch, facts.get("dtype", "float32"))), load_tokenizer(name, chat_template=facts.get("chat_template")), partial
        )
        (partial / "mix.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['how']} of {len(record['sources'])} adapters, written into the weights of {name}; nothing was cut off")
    print("model:", out)


def _check_alone(ctx: typer.Context) -> None:
    """A recipe has the folders, weights and options; nothing that is typed beside it is left unsaid."""
    sources = {name: ctx.get_parameter_source(name) for name in ("how", "space", "seed")}
    given = [*(f"--{name}" for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"), *ctx.args]
    if given:
        raise BadParameter(f"a recipe says everything; besides it were given: {' '.join(given)}")


def _tree(how: str, folders: list[str], weights: Any, space: str, seed: int, options: dict[str, Any]) -> "Mix":
    """The one mix that flags describe."""
    from pydantic import ValidationError

    from lorakit.adapters.mix.recipe import Mix

    try:
        return Mix(how=how, of=list(folders), space=space, seed=seed, weights=weights, options=options)
    except ValidationError:
        raise BadParameter(f"--weights {weights!r}: expected a number for each adapter, as in --weights 0.7 0.3") from None


def _statistics(how: str, files: Sequence[str]) -> "list[dict[str, Tensor]] | None":
    """One for each adapter."""
    from lorakit.adapters.mix.mixers import get_mixer
    from lorakit.serve.statistics import load_statistics

    if files and get_mixer(how).rule().needs is None:
        raise BadParameter(f"{how} reads no statistics; --stats is for regmean and fisher")
    found = [load_statistics(path) for path in files]
    for path, stats in zip(files, found, strict=True):
        broken = [name for name, tensor in stats.items() if not tensor.isfinite().all()]
        if broken:
            raise BadParameter(f"{path} holds NaN or infinite values at {broken[0]}; make it again with `lorakit statistics`")
    return found or None


def _check(tree: "Mix") -> None:
    """Names and ranges, before any adapter is read."""
    from lorakit.adapters.mix.mix import understood

    understood(tree.how, tree.space, tree.seed, tree.options)
    for part in tree.of:
        if not isinstance(part, str):
            _check(part)


def _check_out(out: str | None, tree: "Mix") -> None:
    if not out:
        raise BadParameter("where the result goes is missing: give --out FOLDER")
    for folder in _folders(tree):
        if Path(out).resolve() == Path(folder).resolve():
            raise BadParameter(f"--out {out} is one of the adapters that are mixed, and would be lost; name another folder")


def _folders(tree: "Mix") -> Iterator[str]:
    for part in tree.of:
        yield from [part] if isinstance(part, str) else _folders(part)


def _loaded(folder: str, model: str | None, bases: "dict[str | None, nn.Module | None]") -> "Adapter":
    """An adapter; `bases` keeps those that folders in PEFT's format are read with."""
    from lorakit.adapters.folder import locate
    from lorakit.adapters.io import RECORD, load_adapter
    from lorakit.serve.open import base_of, recorded

    base = None
    if locate(folder, RECORD) is None:
        name = model or recorded(folder).get("model")
        if name not in bases:
            bases[name] = base_of(folder, model, needed=False)
        base = bases[name]
    try:
        return load_adapter(folder, model=base, lazily=True)
    except AdapterMismatch as error:
        raise AdapterMismatch(f"{folder}: {error}") from None


def parsed(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(folders, options): --weights takes all numbers that follow it, --stats all files, every other flag one value."""
    folders, options = list[str](), dict[str, Any]()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            folders.append(word)
            continue
        name, given, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if key in options:
            raise BadParameter(f"--{name} is given twice")
        if key in SEVERAL and not given:
            options[key] = _several(word, rest)
        elif not given and (not rest or rest[0].startswith("--")):
            raise BadParameter(f"--{name} has no value; options are given as in --density 0.2, and --list shows them")
        else:
            options |= parse_flags([f"--{key}={value if given else rest.pop(0)}"])
            if key in SEVERAL and not isinstance(options[key], list):
                options[key] = [options[key]]
    return folders, options


def _several(flag: str, rest: list[str]) -> list[Any]:
    """The values that a flag takes from the words after it."""
    found = list[Any]()
    while rest and not rest[0].startswith("--") and (one := SEVERAL[flag.removeprefix("--")](rest[0])) is not None:
        found.append(one)
        rest.pop(0)
    if not found:
        what = f"by {rest[0]!r}, which it does not take" if rest else "by nothing"
        raise BadParameter(f"{flag} is followed {what}; expected one for each adapter, as in {flag} {EXAMPLES[flag.removeprefix('--')]}")
    return found


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _file(word: str) -> str | None:
    return None if os.path.isdir(word) else word


SEVERAL: dict[str, Callable[[str], Any]] = {"weights": _number, "stats": _file}
"""Flags that take more than one value, and what makes a value of a word; None: it is none."""
EXAMPLES = {"weights": "0.7 0.3", "stats": "a.safetensors b.safetensors"}


ROUNDING = 1e-6
"""A share of the norm that is none."""


def print_result(record: dict[str, Any], sites: int) -> None:
    """What was done, and how exactly."""
    lost = record["lost"]
    inexact = ", which makes cross terms B_i A_j: not Σ w ΔW" if record["space"].startswith("factor") else ""
    print(f"{record['how']} of {len(record['sources'])} adapters at {sites} sites, in {record['space']} space{inexact}")
    if lost["total"] > ROUNDING:
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
