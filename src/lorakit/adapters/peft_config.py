"""PEFT's adapter_config.json: every field with its default, and which values lorakit can follow.

Tables, not imports: PEFT need not be installed. They are those of the version below, and a test holds them against the real one.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.pattern import checked
from lorakit.core.errors import CheckpointError, NotExportable

CONFIG = "adapter_config.json"
VERSION = "0.21.2"

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": VERSION,
    "revision": None,
    "task_type": None,
}
LORA: dict[str, Any] = {
    **COMMON,
    "peft_type": "LORA",
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
ADALORA: dict[str, Any] = {
    **LORA,
    "peft_type": "ADALORA",
    "beta1": 0.85,
    "beta2": 0.85,
    "deltaT": 1,
    "init_r": 12,
    "orth_reg_weight": 0.5,
    "rank_pattern": None,
    "target_r": 8,
    "tfinal": 0,
    "tinit": 0,
    "total_step": None,
}
DEFAULTS = {"LORA": LORA, "ADALORA": ADALORA}

FOLLOWED = {
    *COMMON, "peft_type", "alpha_pattern", "bias", "eva_config", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "qalora_group_size", "r", "rank_pattern",
    "target_modules", "use_dora", "use_rslora", "runtime_config", *(set(ADALORA) - set(LORA)),
}  # fmt: skip
"""Fields whose values are read, or cannot change what a trained adapter computes."""
REASONS = {
    "target_parameters": "it adapts stacked weights of experts, which lorakit cannot read yet",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "lora_bias": "a bias of the adapter's own has no place in s·B·A",
    "use_qalora": "its A reads pooled inputs",
    "alora_invocation_tokens": "it acts on a part of the sequence only",
    "ensure_weight_tying": "its embedding and head share one adapter",
    "loftq_config": "it was made for a base quantized in one particular way",
}

HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
"""Inits that leave the base alone: of a finished adapter they say nothing any more."""
INITS = (*HARMLESS, "pissa")
"""Of those that change the base only PiSSA's exact one can be repeated exactly."""
CHANGED_BASE = "it changed the base in a way that loading cannot repeat exactly; save it with path_initial_model_for_weight_conversion"

DETERMINED = {"bias", "fan_in_fan_out", "inference_mode", "lora_dropout", "use_dora"}
"""Fields that the adapter alone decides when it is written."""


def read_config(data: bytes, path: Path) -> dict[str, Any]:
    """The checked configuration of a file's bytes."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return check_config(config, path)


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """A configuration with its defaults filled in. Raises CheckpointError, or NotExportable for what lorakit has no form for."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError(f"{path} names no peft_type")
    if kind not in DEFAULTS:
        raise NotExportable(f"{path}: an adapter of peft_type {kind} cannot be read; lorakit reads {' and '.join(DEFAULTS)}")
    full = {**DEFAULTS[kind], **config}
    _refuse(config, path)
    for name, fits in _FITS.items():
        if name in full and not fits(full[name]):
            raise CheckpointError(f"{path}: {name}={full[name]!r} is not a value that PEFT writes there")
    for pattern in [p for name in _PATTERNS for p in _entries(full[name])]:
        checked(pattern, path)
    return full


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    for name, value in sorted(config.items()):
        if name not in FOLLOWED and value not in (None, False, {}, []) and value != LORA.get(name):
            reason = REASONS.get(name, "lorakit does not know what it changes")
            raise NotExportable(f"{path}: {name}={value!r} cannot be followed: {reason}")
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        raise NotExportable(f"{path}: init_lora_weights={init!r} cannot be followed: {CHANGED_BASE}")
    if init == "pissa" and config.get("use_dora"):
        raise NotExportable(f"{path}: PiSSA together with DoRA cannot be followed: the magnitude is that of the residual")


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _rank(value: Any) -> bool:
    return _whole(value) and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _names(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _ranks(value: Any) -> bool:
    """Ranks (LORA) or masks (ADALORA) by pattern."""
    masks = isinstance(value, dict) and all(isinstance(v, list) and all(type(x) is bool for x in v) for v in value.values())
    return value is None or masks or (isinstance(value, dict) and all(_rank(v) for v in value.values()))


_FITS: dict[str, Callable[[Any], bool]] = {
    "alpha_pattern": lambda v: v is None or (isinstance(v, dict) and all(_number(x) for x in v.values())),
    "bias": lambda v: v in ("none", "all", "lora_only"),
    "layers_to_transform": lambda v: v is None or _whole(v) or (isinstance(v, list) and all(_whole(x) for x in v)),
    "rank_pattern": _ranks,
    **dict.fromkeys(("exclude_modules", "layers_pattern", "modules_to_save", "target_modules"), _names),
    **dict.fromkeys(("use_dora", "use_rslora"), lambda v: type(v) is bool),
    **dict.fromkeys(("r", "init_r", "target_r", "deltaT"), _rank),
    **dict.fromkeys(("tinit", "tfinal"), _whole),
    "total_step": lambda v: v is None or _whole(v),
    **dict.fromkeys(("base_model_name_or_path", "peft_version", "revision", "task_type"), lambda v: v is None or isinstance(v, str)),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight"), _number),
}
_PATTERNS = ("alpha_pattern", "exclude_modules", "layers_pattern", "rank_pattern", "target_modules")


def _entries(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
