"""One format to another: a folder of lorakit's or PEFT's, or a file of kohya's or LyCORIS's, to a folder; on the way cut to plain LoRA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.compact import compact
from lorakit.adapters.cut import Closest, Cut, to_plain
from lorakit.adapters.io import is_file, load_adapter, save_adapter
from lorakit.adapters.kohya_read import closest_in
from lorakit.adapters.peft_write import to_peft
from lorakit.core.adapter import Adapter
from lorakit.core.errors import BadParameter, did_you_mean


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "peft",
    native: bool = True,
    svd_rank: int | None = None,
    model: nn.Module | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    before_0_19: bool = False,
    smaller: bool = False,
    cut: Cut | None = None,
    only: str | None = None,
) -> list[str]:
    """Read an adapter and write it as a folder. Returns lines that say how exact the result is.

    The arguments from `native` to `before_0_19` are those of `to_peft`; the model is also needed to read what lorakit did not write.
    `smaller`: leave out what can be drawn again or serves further training alone (see compact.py). `cut`: plain LoRA of that rank at most,
    whatever the adapter is (see cut.py); lorakit's own format is plain LoRA, too, where `native` is off. `only`: as in kohya_read.py.
    """
    if to not in FORMATS:
        raise BadParameter(f"format {to!r} cannot be written. {did_you_mean(to, FORMATS)}")
    if cut is not None and (svd_rank is not None or smaller):
        raise BadParameter("a cut makes plain LoRA of everything; leave out svd_rank and compact (--svd-rank, --compact)")
    read = opened(source, model=model, cut=cut, only=only)
    adapter = compact(read.adapter) if smaller else read.adapter
    named = {"base_model": base_model, "task_type": task_type}
    lines = FORMATS[to](adapter, target, native=native, svd_rank=svd_rank, model=model, before_0_19=before_0_19, **named)
    return read.lines() + lines[1:] if read.errors else lines


def opened(source: str | Path, *, model: nn.Module | None = None, cut: Cut | None = None, only: str | None = None) -> Closest:
    """An adapter from a folder or a file, as it is or cut to plain LoRA."""
    if is_file(source):
        return closest_in(source, model=model, only=only, cut=cut)
    if only is not None:
        raise BadParameter("only (--only) chooses modules of a kohya or LyCORIS file; a folder holds one model's")
    adapter = load_adapter(source, model=model)
    return Closest(adapter) if cut is None else to_plain(adapter, cut, model=model)


def _peft(adapter: Adapter, target: str | Path, **options: Any) -> list[str]:
    lines = to_peft(adapter, target, **options).lines()
    if adapter.meta.get("quantized") or adapter.method().base is not None:
        lines.append("trained on a quantized base: load it quantized in PEFT too (BitsAndBytesConfig), or the start is another one")
    return lines


def _lorakit(adapter: Adapter, target: str | Path, *, native: bool = True, base_model: str | None = None, **options: Any) -> list[str]:
    plain = adapter if native else to_plain(adapter).adapter
    meta = {**({"model": base_model} if base_model is not None else {}), **plain.meta}
    save_adapter(Adapter(plain.recipe, plain.sites, plain.tensors, meta), target)
    return [f"{plain.recipe.name}, exact"]


FORMATS: dict[str, Callable[..., list[str]]] = {"peft": _peft, "lorakit": _lorakit}
