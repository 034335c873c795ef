"""`lorakit inspect` and `lorakit convert`: adapters at rest."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.use import Folder, Model
from lorakit.core.errors import BadParameter


def inspect(
    adapter: Folder,
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
    adapter: Folder,
    out: Annotated[str, typer.Option("--out", help="new folder")],
    to: Annotated[str, typer.Option("--to", help="peft or lorakit")] = "peft",
    model: Model = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="PiSSA, AdaLoRA, …: write the exact plain LoRA instead of PEFT's own type")
    ] = False,
    svd_rank: Annotated[
        int | None,
        typer.Option("--svd-rank", min=1, help="plain LoRA; where it is not exact (DoRA), the closest of this rank, and its error"),
    ] = None,
    before_0_19: Annotated[
        bool, typer.Option("--before-0-19", help="experts: the layout of PEFT before version 0.19, which later ones do not load")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="VeRA, VB-LoRA: leave out what can be drawn again, or serves further training alone")
    ] = False,
) -> None:
    """Convert between lorakit's format and PEFT's, both ways."""
    from lorakit.adapters.convert import convert as run
    from lorakit.serve.open import base_of, recorded

    name = model or recorded(adapter).get("model")
    base = base_of(adapter, model, needed=svd_rank is not None or before_0_19)
    native = not plain and svd_rank is None
    options: dict[str, Any] = {"native": native, "svd_rank": svd_rank, "before_0_19": before_0_19, "smaller": compact}
    for line in run(adapter, out, to=to, model=base, base_model=name, **options):
        print(line)
    print(f"{to} adapter:", out)


def statistics(
    adapter: Folder,
    data: Annotated[str, typer.Option("--data", help="of the adapter's own task: its validation side is used")],
    out: Annotated[str, typer.Option("--out", help="new file, .safetensors")],
    kind: Annotated[str, typer.Option("--kind", help="gram (for mix --how regmean) or fisher")] = "gram",
    model: Model = None,
    whole: Annotated[bool, typer.Option("--whole", help="use all rows of the source")] = False,
    max_samples: Annotated[int | None, typer.Option("--max-samples", min=1)] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="default: that of the training")] = None,
) -> None:
    """What some mixers need of an adapter's task: the second moment of every site's inputs, or the Fisher information of its weight."""
    from lorakit.serve.open import open_adapter
    from lorakit.serve.statistics import collect, save_statistics

    if not out or Path(out).is_dir():
        raise BadParameter(f"--out {out!r} is no name of a file; expected a new one, as in --out {kind}.safetensors")
    found = collect(open_adapter(adapter, model=model), data, kind, whole=whole, limit=max_samples, max_length=max_length)
    print(f"{kind} of {len(found)} sites:", save_statistics(found, out))
