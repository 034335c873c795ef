"""Fields of adapter_config.json that several of PEFT's types have: defaults, which values PEFT writes, which can be followed."""

import math
from collections.abc import Callable, Mapping
from typing import Any

VERSION = "0.21.2"
"""The PEFT whose tables these are."""

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_version": VERSION,
    "revision": None,
    "task_type": None,
}
TARGETS: dict[str, Any] = {
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "target_modules": None,
}
"""Which modules are adapted, and which are trained whole beside them."""

FOLLOWED = frozenset({*COMMON, *TARGETS, "peft_type", "bias", "exclude_modules", "fan_in_fan_out", "init_weights", "runtime_config"})
"""Fields whose values are read, or cannot change what a trained adapter computes, whatever the type."""
DETERMINED = frozenset({"bias", "fan_in_fan_out", "inference_mode", "lora_dropout", "use_dora", "vera_dropout", "vblora_dropout"})
"""Fields that the adapter alone decides when it is written."""
REASONS = {
    "target_parameters": "stacked weights of experts are read for peft_type LORA alone",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "lora_bias": "a bias of the adapter's own has no place in s·B·A",
    "use_qalora": "its A reads pooled inputs",
    "alora_invocation_tokens": "it acts on a part of the sequence only",
    "ensure_weight_tying": "its embedding and head share one adapter",
    "loftq_config": "it was made for a base quantized in one particular way",
}

Fits = Callable[[Any], bool]


def whole(value: Any) -> bool:
    """0, 1, 2, …"""
    return type(value) is int and value >= 0


def positive(value: Any) -> bool:
    """1, 2, 3, …"""
    return whole(value) and value >= 1


def number(value: Any) -> bool:
    """A finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def switch(value: Any) -> bool:
    """true or false."""
    return type(value) is bool


def text(value: Any) -> bool:
    """A string or nothing."""
    return value is None or isinstance(value, str)


def names(value: Any) -> bool:
    """A string, a list of strings, or nothing."""
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def by_pattern(fits: Fits) -> Fits:
    """Values by regular expression, or nothing."""
    return lambda value: value is None or (isinstance(value, dict) and all(fits(v) for v in value.values()))


def _layers(value: Any) -> bool:
    return value is None or whole(value) or (isinstance(value, list) and all(whole(x) for x in value))


FITS: Mapping[str, Fits] = {
    "layers_to_transform": _layers,
    **dict.fromkeys(("exclude_modules", "layers_pattern", "modules_to_save", "target_modules"), names),
    **dict.fromkeys(("base_model_name_or_path", "peft_version", "revision", "task_type"), text),
}
"""Whether a field's value is one that PEFT writes there, for the fields that mean the same in every type."""
PATTERNS = ("exclude_modules", "layers_pattern", "target_modules")
"""Fields that hold regular expressions, in every type that has them."""
