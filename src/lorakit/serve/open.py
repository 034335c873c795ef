"""Open a base and, on it, an adapter: what eval, generate, chat, merge and inspect start with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lorakit.adapters.folder import locate
from lorakit.adapters.io import RECORD, is_file, load_adapter
from lorakit.adapters.peft_config import CONFIG, read_config
from lorakit.adapters.record import read_bounded, read_record, recipe_in
from lorakit.core.attach import Adapted, attach_adapter
from lorakit.core.base import BaseSpec
from lorakit.core.errors import BadParameter
from lorakit.core.method import get_method
from lorakit.parts.bases.quantize import stored_as
from lorakit.train.source_model import CLASSIFY, load_base, load_model, load_tokenizer


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, its tokenizer, and the adapter on it (None: the base alone)."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapted: Adapted | None
    meta: dict[str, Any]

    @property
    def task(self) -> str:
        """What the model was trained for."""
        return str(self.meta.get("task", "causal-lm"))


def open_base(name: str, *, dtype: str = "float32") -> Opened:
    """A base alone."""
    return Opened(load_model(name, dtype=dtype), load_tokenizer(name), None, {"model": name})


def open_adapter(folder: str | Path, *, model: str | None = None, dtype: str | None = None, force: bool = False) -> Opened:
    """An adapter (lorakit's or PEFT's) on the base that it names, or on `model`.

    Raises BadParameter when the adapter does not say which base it is for, AdapterMismatch when the base is another (unless `force`).
    """
    facts = recorded(folder)
    name = model or facts.get("model")
    if not name:
        raise BadParameter(f"the adapter {folder} does not name its base; give it with --model")
    base = _loaded(folder, model, facts, dtype)
    adapter = load_adapter(folder, model=base)
    tokenizer = load_tokenizer(name, chat_template=facts.get("chat_template"))
    adapted = attach_adapter(base, adapter, force=force)
    return Opened(base.eval(), tokenizer, adapted, adapter.meta)


def base_of(folder: str | Path, model: str | None, *, needed: bool) -> nn.Module | None:
    """The base `model`, or, where it is needed (and always to read a PEFT folder), the one that the adapter names, in fp32 and stored as in
    training; None without a name."""
    facts = recorded(folder)
    name = model or (facts.get("model") if needed or locate(folder, RECORD) is None else None)
    return _loaded(folder, model, facts, "float32") if name else None


def _loaded(folder: str | Path, model: str | None, facts: dict[str, Any], dtype: str | None) -> nn.Module:
    labels, name = facts.get("labels") or None, model or str(facts["model"])
    task = facts.get("task") or (CLASSIFY if labels else "causal-lm")
    try:
        return load_base(name, facts, base_storage(folder), task=task, dtype=dtype, labels=labels)
    except BadParameter as error:
        if model is not None:
            raise
        raise BadParameter(f"{folder} names {name!r} as its base: {error}; or give the base with --model") from None


def base_storage(folder: str | Path) -> BaseSpec | None:
    """How the base of an adapter in a folder was stored in training; None for as it is."""
    own = locate(folder, RECORD)
    if own is None:
        return None
    record = read_record(read_bounded(own), own)
    recipe = recipe_in(record, own)
    return stored_as(record.meta.get("quantized")) or get_method(recipe.name, **recipe.kwargs).base


def recorded(folder: str | Path) -> dict[str, Any]:
    """What an adapter folder says about itself, without a model; of a PEFT folder, the base that it names."""
    own, peft = locate(folder, RECORD), locate(folder, CONFIG)
    if own is not None:
        return read_record(read_bounded(own), own).meta
    if peft is not None:
        return {"model": read_config(read_bounded(peft), peft).get("base_model_name_or_path")}
    if not is_file(folder):  # which says nothing of a base
        load_adapter(folder)  # says what is there instead
    return {}
