"""`lorakit inspect` and `lorakit convert`: adapters at rest."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.use import Folder, Model
from lorakit.core.errors import BadParameter

if TYPE_CHECKING:
    from lorakit.adapters.cut import Cut

Source = Annotated[str, typer.Argument(help="adapter folder (lorakit's or PEFT's), or a kohya or LyCORIS file (.safetensors)")]
Only = Annotated[str | None, typer.Option("--only", help="kohya, LyCORIS: the modules whose names begin so, as in --only lora_te1")]
Rank = Annotated[int | None, typer.Option("--rank", help="plain LoRA of at most this rank: the closest, and its error")]
Energy = Annotated[
    float | None, typer.Option("--energy", help="plain LoRA that holds this share of every site's Σ σ², as in 0.99, and its error")
]


def inspect(
    adapter: Source,
    model: Model = None,
    only: Only = None,
    plot: Annotated[str | None, typer.Option("--plot", help="write the spectrum of every site as PNG")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What an adapter holds: sites, ranks, norms by layer, spectrum, bytes, and the base it was made for.

    Of a kohya or LyCORIS file: its modules with their algorithms, shapes, ranks and norms.
    """
    from rich.console import Console

    from lorakit.adapters.inspect import inspect_adapter, spectrum_plot
    from lorakit.adapters.io import is_file, load_adapter
    from lorakit.adapters.kohya_read import inspect_file
    from lorakit.serve.export import base_for
    from lorakit.train.source_model import load_model

    if is_file(adapter):
        if plot:
            raise BadParameter("--plot is for adapters; `lorakit convert FILE --to lorakit --out FOLDER` makes one of a file")
        modules = inspect_file(adapter, model=base_for(adapter, model), only=only)
        if as_json:
            return print(json.dumps(modules.as_dict(), indent=1))
        return Console(width=None if sys.stdout.isatty() else 140).print(modules.table())
    if only is not None:
        raise BadParameter("--only chooses modules of a kohya or LyCORIS file; a folder holds one model's")
    report = inspect_adapter(load_adapter(adapter, model=load_model(model) if model else None), folder=adapter)
    if plot:
        spectrum_plot(report, plot)
    if as_json:
        return print(json.dumps(report.as_dict(), indent=1))
    Console(width=None if sys.stdout.isatty() else 140).print(report.table())
    if plot:
        print("spectrum:", plot)


def convert(
    adapter: Source,
    out: Annotated[str, typer.Option("--out", help="new folder")],
    to: Annotated[str, typer.Option("--to", help="peft or lorakit")] = "peft",
    model: Model = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="PiSSA, AdaLoRA, …: write the exact plain LoRA instead of PEFT's own type, or of the method")
    ] = False,
    rank: Rank = None,
    energy: Energy = None,
    only: Only = None,
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
    """Convert between lorakit's format and PEFT's, both ways, and kohya and LyCORIS files to either.

    With --rank or --energy any change of weights becomes the closest plain LoRA; the error of every site is printed and kept.
    """
    from lorakit.adapters.convert import convert as run
    from lorakit.adapters.io import is_file
    from lorakit.serve.export import base_for, needs_base
    from lorakit.serve.merge import check_new
    from lorakit.serve.open import recorded

    check_new(Path(out))
    cut = cut_of(rank, energy)
    name = model or (None if is_file(adapter) else recorded(adapter).get("model"))
    base = base_for(adapter, model, needed=svd_rank is not None or before_0_19 or needs_base(adapter, cut))
    native = not plain and svd_rank is None
    options: dict[str, Any] = {"native": native, "svd_rank": svd_rank, "before_0_19": before_0_19, "smaller": compact}
    options |= {"cut": cut, "only": only}
    for line in run(adapter, out, to=to, model=base, base_model=name, **options):
        print(line)
    print(f"{to} adapter:", out)


def cut_of(rank: int | None, energy: float | None) -> "Cut | None":
    """What --rank and --energy say."""
    from lorakit.adapters.cut import Cut

    return None if rank is None and energy is None else Cut(rank, energy)


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

    if not out or os.path.isdir(out):
        raise BadParameter(f"--out {out!r} is no name of a file; expected a new one, as in --out {kind}.safetensors")
    found = collect(open_adapter(adapter, model=model), data, kind, whole=whole, limit=max_samples, max_length=max_length)
    print(f"{kind} of {len(found)} sites:", save_statistics(found, out))
