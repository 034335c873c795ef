"""The model and tokenizer of a run: a local folder, a Hub name, or the bundled base."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from lorakit.core.base import BaseSpec
from lorakit.core.errors import BadParameter, CheckpointError, did_you_mean
from lorakit.parts.bases.quantize import quantize
from lorakit.train.chat_templates import TEMPLATES
from lorakit.train.config import BUNDLED
from lorakit.train.packed_folder import is_packed, load_packed

CLASSIFY, TAG = "sequence-classification", "token-classification"
HEADED: dict[str, Any] = {CLASSIFY: AutoModelForSequenceClassification, TAG: AutoModelForTokenClassification}
"""Tasks whose model has a head of its own, with one output per label; every other task's is a language model."""
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)
"""What Transformers raises over a folder whose files are damaged, of the wrong kind, or of a version that it does not know."""
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)
"""What Transformers raises over a folder whose files are damaged, of the wrong kind, or of a version that it does not know."""


def bundled_base() -> Path:
    """The folder of the base that ships with the package."""
    folder = Path(__file__).parents[1] / "data" / "base"
    if not (folder / "config.json").exists():
        raise CheckpointError(f"the bundled base is missing from {folder}; reinstall lorakit, or name a model folder with --model")
    return folder


def resolve(name: str) -> str:
    """'bundled' -> its folder; anything else as it is. A path that does not exist is an error, not a download."""
    if name == BUNDLED:
        return str(bundled_base())
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # Path.exists fails on a name that is too long, Path.expanduser on a user whom nobody knows
        return str(path)
    if looks_local:
        raise BadParameter(f"no model folder at {name}; give a folder with config.json, a Hub name, or 'bundled'")
    return name


def load_model(name: str, *, task: str = "causal-lm", dtype: str = "float32", labels: list[Any] | None = None) -> nn.Module:
    """A Transformers model in eval mode. For a task with `labels`, one with an output per label."""
    source = resolve(name)
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if task in HEADED:
        names = {i: str(label) for i, label in enumerate(labels or [])}
        options |= {"num_labels": len(names) or 2, "id2label": names, "label2id": {v: k for k, v in names.items()}}
    try:
        config = AutoConfig.from_pretrained(source, **{k: v for k, v in options.items() if k != "dtype"})
        encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        auto = HEADED.get(task) or (AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM)
        with _quiet():  # that a head is new is no news: it is trained here, or filled from the adapter
            packed = is_packed(config)
            model: nn.Module = load_packed(auto, source, config, options["dtype"]) if packed else _loaded(auto, source, options)
    except UNREADABLE as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadParameter(f"cannot load a {task} model from {name!r}: {said}") from None
    return model.eval()


def _loaded(auto: Any, source: str, options: dict[str, Any]) -> nn.Module:
    """The model in a folder. A head for other labels is replaced by a new one; nothing else may have other shapes."""
    model, info = auto.from_pretrained(source, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    others = [key for key, *_ in info["mismatched_keys"] if not key.startswith(tuple(f"{head}." for head in head_of(model)))]
    if others:
        raise ValueError(f"{sorted(others)[0]} has another shape in the weights than the configuration says")
    return model  # type: ignore[no-any-return]


def load_base(
    name: str, facts: Mapping[str, Any], spec: BaseSpec | None, *, task: str, dtype: str | None = None, labels: list[Any] | None = None
) -> nn.Module:
    """The base of an adapter that says `facts` of itself, stored by `spec` as in training.

    It is packed in the dtype that it had then and cast to `dtype` after: packed from other roundings, the codes would differ.
    """
    trained = facts.get("dtype", "float32")
    if spec is None:
        return load_model(name, task=task, dtype=dtype or trained, labels=labels)
    packed_from = (facts.get("quantized") or {}).get("dtype", trained)
    model = quantize(load_model(name, task=task, dtype=packed_from, labels=labels), spec)
    return model if dtype in (None, packed_from) else _cast(model, getattr(torch, dtype))


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """To another dtype as if loaded in it: what is no part of a checkpoint (rotary frequencies) keeps its own."""
    kept = [(module, name, module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set]
    model.to(dtype)
    for module, name, tensor in kept:
        module._buffers[name] = tensor
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def load_tokenizer(name: str, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token and, if given, another chat template (text or a file)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise BadParameter(f"cannot load a tokenizer from {name!r}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template if "{" in chat_template else _template_in(chat_template)
    return tokenizer


def _template_in(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8 text"
        hint = did_you_mean(file, TEMPLATES)
        raise BadParameter(f"chat_template={file!r} is neither a Jinja template nor a readable file: {why}. {hint}".rstrip()) from None


def head_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the classification head's modules, which every method trains whole."""
    return tuple(name for name, _ in model.named_children() if name in ("score", "classifier", "classification_head", "qa_outputs"))
