"""The `lorakit` command: registers one function a command, and prints an error of ours as one line.

To add a command, write its function in a module of this folder and add a line below. Its flags are the signature, its help the docstring.
Import what is heavy or optional inside the function: `lorakit --help` pays for every import at the top.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from lorakit.cli import (
    at_rest,
    compress,
    config_schema,
    diagnose,
    doctor,
    ensemble,
    export,
    library,
    methods,
    mix,
    preprocess,
    presets,
    quickstart,
    runs,
    search,
    train,
    use,
)
from lorakit.core.errors import LorakitError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # Transformers imports it where it is installed; nothing here runs in it

app = typer.Typer(
    name="lorakit",
    help="One toolkit for everything people do with low-rank adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
diagnoses = typer.Typer(help="Look into adapters at rest; each command has a picture (--png).", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(diagnoses, name="diagnose")
libraries = typer.Typer(help="A folder of adapters that is searched by prompts.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(libraries, name="library")


def command(name: str, function: Callable[..., Any], *, settings: dict[str, Any] | None = None, group: typer.Typer = app) -> None:
    """Register a command: LorakitError becomes one line on stderr and exit code 2, a traceback only under LORAKIT_DEBUG=1.

    `settings` are click's context settings, for commands whose flags are not all in the signature; `group` holds commands of two words.
    """

    @functools.wraps(function)
    def reported(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except LorakitError as error:
            if os.environ.get("LORAKIT_DEBUG") == "1":
                raise
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from None

    group.command(name, context_settings=settings)(reported)


command("quickstart", quickstart.quickstart)
command("train", train.train, settings=train.SETTINGS)
command("preprocess", preprocess.preprocess, settings=preprocess.SETTINGS)
command("runs", runs.runs)
command("config-schema", config_schema.config_schema)
command("presets", presets.presets)
command("doctor", doctor.doctor)
command("eval", use.eval_)
command("generate", use.generate)
command("chat", use.chat)
command("inspect", at_rest.inspect)
command("merge", use.merge)
command("convert", at_rest.convert)
command("export", export.export)
command("compress", compress.compress)
command("statistics", at_rest.statistics)
command("mix", mix.mix, settings=mix.SETTINGS)
command("mix-search", search.mix_search, settings=search.SETTINGS)
command("distance", diagnose.distance)
command("subspace", diagnose.subspace, group=diagnoses)
command("amplification", diagnose.amplification, group=diagnoses)
command("spectrum", diagnose.spectrum, group=diagnoses)
command("ensemble", ensemble.ensemble)
command("add", library.add, group=libraries)
command("train-encoder", library.train_encoder, group=libraries)
command("search", library.search, group=libraries)
command("export", library.export, group=libraries)
command("generate", library.generate, group=libraries)
command("list", methods.list_)
command("show", methods.show)
command("new-method", methods.new_method)

if __name__ == "__main__":
    app()
