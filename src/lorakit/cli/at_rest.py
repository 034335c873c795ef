"""`lorakit inspect` and `lorakit convert`: adapters at rest."""

import json
import sys
from typing import Annotated

import typer

from lorakit.cli.use import Adapter, Model


def inspect(
    adapter: Adapter,
    model: Model = None,
    plot: Annotated[str | None, typer.Option("--plot", help="write the spectrum of every site as PNG")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What an adapter holds: sites, ranks, norms by layer, spectrum, bytes, and the base it was made for."""
    from rich.console import Console

    from lorakit.adapters.inspect import inspect_adapter, spectrum_plot
    from lorakit.adapters.io import load_adapter
    from lorakit.train.source_model import load_model

    report = inspect_adapter(load_adapter(adapter, model=load_model(model) if model else None), folder=adapter)
    if plot:
        spectrum_plot(report, plot)
    if as_json:
        return print(json.dumps(report.as_dict(), indent=1))
    Console(width=None if sys.stdout.isatty() else 140).print(report.table())
    if plot:
        print("spectrum:", plot)


def convert(
    adapter: Adapter,
    out: Annotated[str, typer.Option("--out", help="new folder")],
    to: Annotated[str, typer.Option("--to", help="peft or lorakit")] = "peft",
    model: Model = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="PiSSA, AdaLoRA, …: write the exact plain LoRA instead of PEFT's own type")
    ] = False,
    svd_rank: Annotated[
        int | None, typer.Option("--svd-rank", min=1, help="what has no exact form: approximate at this rank, and print the error")
    ] = None,
) -> None:
    """Convert between lorakit's format and PEFT's, both ways."""
    from lorakit.adapters.convert import convert as run
    from lorakit.train.source_model import load_model

    base = load_model(model) if model else None
    for line in run(adapter, out, to=to, native=not plain, svd_rank=svd_rank, model=base, base_model=model):
        print(line)
    print(f"{to} adapter:", out)
