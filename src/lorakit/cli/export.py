"""`lorakit export`: a finished adapter for other programs."""

from typing import Annotated

import typer

from lorakit.cli import at_rest, use
from lorakit.cli.at_rest import Energy, Only, Rank, Source, cut_of
from lorakit.cli.use import Force, Model
from lorakit.core.errors import BadParameter, did_you_mean

FORMATS = ("merged", "peft", "gguf")


def export(
    adapter: Source,
    to: Annotated[str, typer.Option("--to", help="merged (a whole model), peft (a folder), gguf (a LoRA for llama.cpp)")],
    out: Annotated[str, typer.Option("--out", help="new folder; of gguf a new file")],
    model: Model = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="merged: as `merge`; gguf: float32 or float16, default float32; peft has the adapter's")
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    only: Only = None,
    force: Force = False,
) -> None:
    """Write an adapter for other programs: merged into its base, for PEFT, or for llama.cpp.

    The first is what `lorakit merge` does, the second `lorakit convert`; both have more flags. The third is loaded beside a GGUF of the
    base: llama-cli -m base.gguf --lora adapter.gguf.
    """
    if to not in FORMATS:
        raise BadParameter(f"--to {to!r} cannot be written. {did_you_mean(to, FORMATS)}")
    cut = cut_of(rank, energy)
    if to == "merged":
        if cut is not None or only is not None:
            raise BadParameter("--to merged takes the adapter as it is, uncut; leave out --rank, --energy and --only, or convert it first")
        return use.merge(adapter, out, model=model, dtype=dtype, force=force)
    if force:
        raise BadParameter("--force is for --to merged: the others do not compare the base's weights; leave it out")
    if to == "peft":
        if dtype is not None:
            raise BadParameter("--dtype is for merged and gguf: a PEFT folder holds the adapter's own numbers; leave it out")
        return at_rest.convert(adapter, out, to="peft", model=model, rank=rank, energy=energy, only=only)
    from lorakit.serve.export import export_gguf

    for line in export_gguf(adapter, out, model=model, dtype=dtype or "float32", cut=cut, only=only):
        print(line)
    print("GGUF LoRA:", out)
