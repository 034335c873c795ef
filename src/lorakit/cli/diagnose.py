"""`lorakit distance` and `lorakit diagnose`: adapters at rest beside each other, and beside the weights that they change."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from lorakit.cli.use import Folder, Force, Model
from lorakit.core.errors import BadParameter

Folders = Annotated[list[str], typer.Argument(help="adapter folders (lorakit's or PEFT's), two or more")]
Sites = Annotated[list[str] | None, typer.Option("--sites", help="only these: a preset, a name, a glob, re:REGEX; may be repeated")]
Png = Annotated[str | None, typer.Option("--png", help="write the picture to this file")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object, for programs")]
Compare = Annotated[bool, typer.Option("--force", help="compare adapters of different bases")]
Rescaled = Annotated[str | None, typer.Option("--model", help="base folder or Hub name: for adapters that rescale W, and PEFT's")]


def distance(
    adapters: Folders, sites: Sites = None, model: Rescaled = None, png: Png = None, as_json: AsJson = False, force: Compare = False
) -> None:
    """How far apart adapters are. Cosine of ΔW, overlap of row and column spaces, conflict of signs; --png draws the heat maps."""
    from lorakit.adapters.diagnose.distance import distance as run
    from lorakit.adapters.diagnose.plot import distance_map

    _check_drawable(png)
    read, base = _read(adapters, model, force)
    found = run(read, where=sites, model=base, force=force)
    if png:
        distance_map(found, png)
    _print(found, as_json, png)


def subspace(
    a: Folder,
    b: Folder,
    space: Annotated[str, typer.Option("--space", help="rows or columns of ΔW, or A or B alone")] = "rows",
    sites: Sites = None,
    model: Rescaled = None,
    png: Png = None,
    as_json: AsJson = False,
    force: Compare = False,
) -> None:
    """Which directions two adapters share. φ(i, j) of LoRA, section 7.2, for all i and j at every weight."""
    from lorakit.adapters.diagnose.plot import overlap_map
    from lorakit.adapters.diagnose.subspace import overlaps

    _check_drawable(png)
    read, base = _read([a, b], model, force)
    found = overlaps(read, space=space, where=sites, model=base, force=force)
    if png:
        overlap_map(found, png)
    _print(found, as_json, png)


def amplification(
    adapter: Folder, model: Model = None, sites: Sites = None, png: Png = None, as_json: AsJson = False, force: Force = False
) -> None:
    """How much an update amplifies what W does in its directions. LoRA, section 7.3, with W's own directions and random ones beside it."""
    from lorakit.adapters.diagnose.amplification import amplifications
    from lorakit.adapters.diagnose.plot import amplification_plot

    _check_drawable(png)
    read, base = _on_its_base(adapter, model, force)
    found = amplifications(read, base, name=adapter, where=sites)
    if png:
        amplification_plot(found, png)
    _print(found, as_json, png)


def spectrum(
    adapter: Annotated[str, typer.Argument(help="adapter folder, or the folder of a model that was fine-tuned whole")],
    model: Model = None,
    sites: Sites = None,
    intruders: Annotated[
        bool, typer.Option("--intruders/--no-intruders", help="two dense decompositions of every weight; without them no base is needed")
    ] = True,
    top: Annotated[int, typer.Option("--top", min=1, help="intruders: singular vectors of W + ΔW that are looked at")] = 10,
    epsilon: Annotated[float, typer.Option("--epsilon", min=0.0, max=1.0, help="intruders: the cosine below which one is")] = 0.5,
    png: Png = None,
    as_json: AsJson = False,
    force: Force = False,
) -> None:
    """How many directions an update uses. Rank of 90 %, stable and effective rank, intruder dimensions; also of full fine-tuning."""
    from lorakit.adapters.diagnose.plot import spectra_plot
    from lorakit.adapters.diagnose.spectrum import spectra, spectra_of_tuning

    _check_drawable(png)
    options: dict[str, Any] = {"name": adapter, "intruders": intruders, "top": top, "epsilon": epsilon}
    if _is_model(adapter):
        base, tuned = _two_models(adapter, model)
        found = spectra_of_tuning(base, tuned, where=sites or "all-linear", **options)
    elif intruders:
        found = spectra(*_on_its_base(adapter, model, force, " (or leave W aside: --no-intruders)"), where=sites, **options)
    else:
        read, given = _read([adapter], model, force)
        found = spectra(next(iter(read.values())), given, where=sites, **options)
    if png:
        spectra_plot(found, png)
    _print(found, as_json, png)


class Found(Protocol):
    """What a diagnosis gives."""

    def as_dict(self) -> dict[str, Any]: ...
    def table(self) -> Any: ...


def _print(found: Found, as_json: bool, png: str | None) -> None:
    if as_json:
        return print(json.dumps(found.as_dict(), indent=1, ensure_ascii=False, allow_nan=False))
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(found.table())
    if png:
        print("picture:", png)


def _check_drawable(png: str | None) -> None:
    from lorakit.adapters.diagnose.plot import drawable

    if png is not None:
        drawable(png)


def _read(folders: Sequence[str], model: str | None, force: bool) -> tuple[dict[str, Any], Any]:
    """The adapters by name, and the base where --model names one."""
    from lorakit.adapters.io import load_adapter
    from lorakit.core.fingerprint import check_base, fingerprint
    from lorakit.serve.open import base_of

    names, read = _names(folders), dict[str, Any]()
    base = base_of(folders[0], model, needed=True) if model else None
    found = None if base is None else fingerprint(base)
    for name, folder in zip(names, folders, strict=True):
        read[name] = load_adapter(folder, model=base or base_of(folder, None, needed=False), lazily=True)
        if found is not None:
            check_base(read[name], found, force=force)
    return read, base


def _names(folders: Sequence[str]) -> list[str]:
    """Of each the last parts of its path that tell it from the others; two where the last is what `lorakit train` calls every adapter."""
    parts = [Path(folder).absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise BadParameter("one adapter folder is given twice; expected different ones")

    def name(own: tuple[str, ...]) -> str:
        first = 2 if own[-1] == "adapter" else 1
        ends = (own[-n:] for n in range(first, len(own) + 1))
        return "/".join(next(end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1))

    return [name(own) for own in parts]


def _on_its_base(folder: str, model: str | None, force: bool, hint: str = "") -> tuple[Any, Any]:
    """An adapter and the base that it was made for. `hint`: what to type where that is not known, besides --model."""
    from lorakit.adapters.io import load_adapter
    from lorakit.core.fingerprint import check_base, fingerprint
    from lorakit.serve.open import base_of

    base = base_of(folder, model, needed=True)
    if base is None:
        raise BadParameter(f"the adapter {folder} does not name its base; give it with --model{hint}")
    adapter = load_adapter(folder, model=base, lazily=True)
    check_base(adapter, fingerprint(base), force=force)
    return adapter, base


def _is_model(folder: str) -> bool:
    """Whether a folder holds a whole model and no adapter."""
    from lorakit.adapters.folder import locate
    from lorakit.adapters.io import RECORD
    from lorakit.adapters.peft_config import CONFIG

    return (Path(folder) / "config.json").is_file() and not any(locate(folder, name) for name in (RECORD, CONFIG))


def _two_models(folder: str, model: str | None) -> tuple[Any, Any]:
    from lorakit.train.source_model import load_model

    if model is None:
        raise BadParameter(f"{folder} is a whole model: give the one that it was tuned from with --model")
    return load_model(model), load_model(folder)
