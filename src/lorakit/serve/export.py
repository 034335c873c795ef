"""A finished adapter for other programs: a merged model, a PEFT folder, a GGUF LoRA for llama.cpp.

merged   `merge`, verified                          serve/merge.py
peft     `convert`                                  adapters/convert.py
gguf     one file beside a GGUF of the base         adapters/gguf.py
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel

from lorakit.adapters.convert import opened
from lorakit.adapters.cut import Cut
from lorakit.adapters.folder import locate
from lorakit.adapters.gguf import to_gguf
from lorakit.adapters.io import RECORD, is_file
from lorakit.adapters.record import read_bounded, read_record, recipe_in
from lorakit.core.combine import AddSpec
from lorakit.core.errors import BadParameter, CheckpointError
from lorakit.core.method import get_method
from lorakit.serve.open import base_of, recorded
from lorakit.train.source_model import load_model, resolve


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    dtype: str = "float32",
    cut: Cut | None = None,
    only: str | None = None,
) -> list[str]:
    """Write a GGUF LoRA; returns lines that say how exact it is. The weights of the base are loaded only where they are needed: to read
    what lorakit did not write, for parts of fused weights, and to cut what rescales W.

    Raises what `to_gguf` raises, and BadParameter where the base is not named.
    """
    if Path(out).exists():
        raise CheckpointError(f"{out} exists; give another --out")
    facts = {} if is_file(source) else recorded(source)
    name = model or facts.get("model")
    if not name:
        raise BadParameter(f"the adapter {source} does not name its base, whose configuration says how a GGUF has it; give it with --model")
    base = base_for(source, model) if needs_base(source, cut, fused=True) else None
    read = opened(source, model=base, cut=cut, only=only)
    config = _config(str(name)) if base is None else base.config.to_dict()  # type: ignore[operator, union-attr]
    lines = to_gguf(read.adapter, out, config=config, model=base, dtype=dtype, name=Path(source).stem).lines()
    return read.lines() + lines if read.errors else lines


def base_for(source: str | Path, model: str | None, *, needed: bool = True) -> nn.Module | None:
    """The base that an adapter is read with: `base_of`; for a file of kohya's any model of Transformers, an encoder alone too."""
    return (None if model is None else any_model(model)) if is_file(source) else base_of(source, model, needed=needed)


def any_model(name: str) -> nn.Module:
    """A language model, or where there is no head of that kind (CLIP's text encoder) the model alone."""
    try:
        return load_model(name)
    except BadParameter as error:
        try:
            model: nn.Module = AutoModel.from_pretrained(resolve(name))
        except (OSError, ValueError):
            raise error from None
        return model.eval()


def needs_base(source: str | Path, cut: Cut | None, *, fused: bool = False) -> bool:
    """Whether an adapter is read with its base's weights: always what lorakit did not write, else to cut what rescales W and, for formats
    that hold a fused weight whole (`fused`), where parts of one are adapted."""
    path = locate(source, RECORD)
    if path is None:
        return True
    record = read_record(read_bounded(path), path)
    recipe = recipe_in(record, path)
    rescales = not isinstance(get_method(recipe.name, **recipe.kwargs).combine, AddSpec)
    return (cut is not None and rescales) or (fused and any(site.rows is not None for site in record.sites))


def _config(name: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(resolve(name)).to_dict()
    except (OSError, ValueError) as error:
        raise BadParameter(f"cannot read the configuration of {name!r}: {str(error).splitlines()[0]}") from None
    return config
