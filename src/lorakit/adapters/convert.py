"""One format to the other, folder to folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.compact import compact
from lorakit.adapters.io import load_adapter, save_adapter
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
) -> list[str]:
    """Read an adapter folder of either format and write another one. Returns lines that say how exact the result is.

    The arguments after `to` are those of `to_peft`; the model is also needed to read a folder that PEFT wrote. `smaller`: leave out what
    can be drawn again or serves further training alone (see compact.py).
    """
    if to not in FORMATS:
        raise BadParameter(f"format {to!r} cannot be written. {did_you_mean(to, FORMATS)}")
    adapter = load_adapter(source, model=model)
    adapter = compact(adapter) if smaller else adapter
    named = {"base_model": base_model, "task_type": task_type}
    return FORMATS[to](adapter, target, native=native, svd_rank=svd_rank, model=model, before_0_19=before_0_19, **named)


def _peft(adapter: Adapter, target: str | Path, **options: Any) -> list[str]:
    lines = to_peft(adapter, target, **options).lines()
    if adapter.meta.get("quantized") or adapter.method().base is not None:
        lines.append("trained on a quantized base: load it quantized in PEFT too (BitsAndBytesConfig), or the start is another one")
    return lines


def _lorakit(adapter: Adapter, target: str | Path, **options: Any) -> list[str]:
    save_adapter(adapter, target)
    return [f"{adapter.recipe.name}, exact"]


FORMATS: dict[str, Callable[..., list[str]]] = {"peft": _peft, "lorakit": _lorakit}
