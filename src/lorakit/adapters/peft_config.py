"""PEFT's adapter_config.json: the fields of its type with their defaults, each checked, and what lorakit cannot follow refused.

Tables, not imports: PEFT need not be installed. They stand in peft_fields and in each type's file, and a test holds them against the real
one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.pattern import checked
from lorakit.adapters.peft_fields import FITS, PATTERNS, REASONS
from lorakit.adapters.peft_type import Table
from lorakit.adapters.peft_types import TABLES, TYPES
from lorakit.core.errors import CheckpointError, NotExportable

CONFIG = "adapter_config.json"


def read_config(data: bytes, path: Path) -> dict[str, Any]:
    """The checked configuration of a file's bytes."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return check_config(config, path)


def check_config(config: Any, path: Path) -> dict[str, Any]:
    """A configuration with its defaults filled in. Raises CheckpointError, or NotExportable for what lorakit has no form for."""
    name = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise CheckpointError(f"{path} names no peft_type")
    if name not in TABLES:
        raise NotExportable(f"{path}: an adapter of peft_type {name} cannot be read; lorakit reads {', '.join(TABLES)}")
    table = TABLES[name]
    full = {**table.config, **config}
    _refuse_unknown(config, table, path)
    biases = {"bias": lambda value: value in ("none", "all", table.bias)}
    for name, fits in {**FITS, **biases, **table.fits}.items():
        if name in full and not fits(full[name]):
            raise CheckpointError(f"{path}: {name}={full[name]!r} is not a value that PEFT writes there")
    if full["peft_type"] in TYPES:
        TYPES[full["peft_type"]].refuse(full, path)
    for pattern in [p for name in (*PATTERNS, *table.patterns) for p in _entries(full.get(name))]:
        checked(pattern, path)
    return full


def _refuse_unknown(config: Mapping[str, Any], table: Table, path: Path) -> None:
    for name, value in sorted(config.items()):
        if name not in table.followed and value not in (None, False, {}, []) and value != table.config.get(name):
            reason = REASONS.get(name, "lorakit does not know what it changes")
            raise NotExportable(f"{path}: {name}={value!r} cannot be followed: {reason}")


def _entries(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
