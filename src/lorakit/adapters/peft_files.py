"""The files of a PEFT folder, and what their tensors are: those of modules, those that modules share, whole trained parameters, copies of
base weights.

lorakit.json stands beside the two files that lorakit writes and says what the adapter was. It names them by their digests: when PEFT has
saved over them since, it no longer speaks of them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from torch import Tensor

from lorakit.adapters.folder import locate
from lorakit.adapters.peft_experts import Targets
from lorakit.adapters.peft_names import PREFIX, SHARED, VOCABULARY, Keys, parsed, saved_module
from lorakit.adapters.peft_type import Found, Part
from lorakit.adapters.peft_types import TYPES
from lorakit.adapters.record import Record, read_bounded, read_record
from lorakit.core.errors import AdapterMismatch, CheckpointError
from lorakit.core.site import Kind

WEIGHTS = "adapter_model.safetensors"
SIDE = "lorakit.json"
BASE = ".base_layer.weight"
"""End of the key under which PEFT saves the base weight of an adapted embedding."""


@dataclass(frozen=True)
class Side:
    """What lorakit.json says."""

    path: Path
    record: Record
    restorable: bool


class _Side(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    adapter: dict[str, Any]
    files: dict[str, str]
    restorable: bool


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 by file name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def read_side(folder: Path, files: Mapping[str, str]) -> Side | None:
    """lorakit.json, when there is one and it speaks of these very files. Raises CheckpointError when it is damaged."""
    path = locate(folder, SIDE)
    if path is None:
        return None
    try:
        side = _Side.model_validate_json(read_bounded(path))
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {error.errors()[0]['msg']}; without it the folder is read as PEFT's") from error
    if side.files != dict(files):
        return None
    return Side(path, read_record(json.dumps(side.adapter).encode(), path), side.restorable)


def sorted_out(config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path, targets: Targets) -> Found[Any]:
    """Every tensor in its place. Raises AdapterMismatch for one that has none."""
    kind = TYPES[config["peft_type"]]
    parts, rest = _parts(kind.table.keys, kind.opened(tensors, config, targets, path), path)
    if not parts:
        raise AdapterMismatch(f"{path.parent} holds no tensors of peft_type {kind.table.name}")
    shorts = {SHARED + key: name for name, key in kind.table.shared.items()}
    shared = {shorts[key]: tensor for key, tensor in rest.items() if key in shorts}
    named = {_named(key, path): tensor for key, tensor in rest.items() if key not in shorts}
    base = {name.removesuffix(BASE): tensor for name, tensor in named.items() if _is_base(name)}
    saved = {_parameter(name, config, path): tensor for name, tensor in named.items() if not _is_base(name)}
    modules = {module: kind.module(module, part, config, path) for module, part in parts.items()}
    return Found(config, path, modules, shared, saved, base)


def _parts(keys: Keys, tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Part], dict[str, Tensor]]:
    """Each module's tensors, and the rest."""
    raw: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, list[Kind]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = parsed(key.removeprefix(PREFIX), keys) if key.startswith(PREFIX) else None
        if place is None:
            rest[key] = tensor
        else:
            module, possible, short = place
            raw.setdefault(module, {})[short] = tensor
            kinds[module] = [k for k in kinds.get(module, possible) if k in possible]
    for module, left in kinds.items():
        if not left:
            raise AdapterMismatch(f"module {module!r} in {path.parent} has tensors of different kinds of module: {sorted(raw[module])}")
    return {module: Part(kinds[module][0], found) for module, found in raw.items()}, rest


def _named(key: str, path: Path) -> str:
    if not key.startswith(PREFIX):
        raise AdapterMismatch(f"tensor {key!r} in {path.parent} does not start with {PREFIX!r}: these are not PEFT's names")
    return key.removeprefix(PREFIX)


def _is_base(name: str) -> bool:
    return name.endswith(BASE) and name.removesuffix(BASE).split(".")[-1] in VOCABULARY


def _parameter(name: str, config: Mapping[str, Any], path: Path) -> str:
    """The path of a parameter that was trained as a whole."""
    plain = name.replace(".base_layer.", ".")
    bias = config.get("bias", "none") != "none" and plain.endswith(".bias")
    vocabulary = name.endswith(".weight") and name.split(".")[-2] in VOCABULARY  # saved by PEFT when the vocabulary was resized
    if not (bias or vocabulary or (plain == name and saved_module(name, config["modules_to_save"] or ()))):
        kind = config["peft_type"]
        raise AdapterMismatch(f"tensor {PREFIX}{name} is neither one of peft_type {kind} nor part of a module that {path} names as saved")
    return plain
