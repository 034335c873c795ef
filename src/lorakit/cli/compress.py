"""`lorakit compress`: a finished adapter in a fraction of its bytes."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.use import Folder, Model


def compress(
    adapter: Folder,
    out: Annotated[str, typer.Option("--out", help="new folder; read like any other, decoded exactly")],
    density: Annotated[float, typer.Option("--density", help="share of the trained values that is kept")] = 0.2,
    alpha: Annotated[
        float, typer.Option("--alpha", help="size of the kept values, in standard deviations; best chosen on held-out data")
    ] = 1.0,
    scope: Annotated[
        str, typer.Option("--scope", help="what has one threshold and one size: factor, tensor, or adapter (the paper)")
    ] = "factor",
    keep: Annotated[
        str, typer.Option("--keep", help="of the kept values: ternary (the paper), mean, or magnitude (as they are)")
    ] = "ternary",
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Write an adapter in a fraction of its bytes (ComPEFT). Most values become zero, of the others one size and the signs are kept,
    coded near their entropy; prints what that saved, and what it cost of ΔW.
    """
    from lorakit.adapters.compress import compress as run
    from lorakit.adapters.compress import report
    from lorakit.adapters.io import load_adapter, save_adapter
    from lorakit.core.errors import BadParameter
    from lorakit.serve.open import base_of

    if Path(out).resolve() == Path(adapter).resolve():
        raise BadParameter(f"--out {out} is the adapter itself, of which compressing loses a part; name another folder")
    before = load_adapter(adapter, model=base_of(adapter, model, needed=False))
    after = run(before, density=density, alpha=alpha, scope=scope, keep=keep)
    save_adapter(after, out, coded=True)
    found = report(before, after, out)
    if as_json:
        return print(json.dumps(dataclasses.asdict(found), indent=1))
    times, share = found.tensor_bytes / found.file_bytes, 100 * found.kept / found.values
    print(f"{found.tensor_bytes:,} bytes of tensors, {found.file_bytes:,} bytes in the file: {times:.1f} times smaller")
    print(f"{found.kept:,} of {found.values:,} values kept ({share:.1f} %): {found.bits:.3f} bits a value (entropy {found.entropy:.3f})")
    print(f"relative error of ΔW: {found.error:.3f} (Frobenius, all sites); what that means for the task, `lorakit eval` says")
    if found.lost:
        print(
            f"{len(found.lost)} of {found.sites} sites have no update left ({found.lost[0]}, …): their values lay below a threshold that "
            "they share with others; --scope tensor has one for each"
        )
    print("compressed adapter:", out)
