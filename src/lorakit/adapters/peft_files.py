"""The files of a PEFT folder, and what their tensors are: pairs by module, whole trained parameters, copies of base weights.

lorakit.json stands beside the two files that lorakit writes and says what the adapter was. It names them by their digests: when PEFT has
saved over them since, it no longer speaks of them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from lorakit.adapters.folder import locate
from lorakit.adapters.pair import Pair
from lorakit.adapters.peft_names import PREFIX, VOCABULARY, parsed, saved_module
from lorakit.adapters.peft_rank import rank_in
from lorakit.adapters.record import Record, read_bounded, read_record
from lorakit.core.errors import AdapterMismatch, CheckpointError
from lorakit.core.scale import RULES

WEIGHTS = "adapter_model.safetensors"
SIDE = "lorakit.json"


@dataclass(frozen=True)
class Found:
    """What a folder holds."""

    config: dict[str, Any]
    path: Path
    """The configuration's."""
    pairs: dict[str, Pair]
    """By module."""
    saved: dict[str, Tensor]
    """Parameters trained as a whole, by path."""
    base: dict[str, Tensor]
    """Weights of adapted embeddings as PEFT saw them, by module."""


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


def sorted_out(config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Found:
    """Every tensor in its place. Raises AdapterMismatch for one that has none."""
    raw: dict[str, dict[str, Any]] = {}
    saved: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        place = parsed(name, config["peft_type"])
        if name == key:
            raise AdapterMismatch(f"tensor {key!r} in {path.parent} does not start with {PREFIX!r}: these are not PEFT's names")
        if place is not None:
            module, kind, short = place
            raw.setdefault(module, {})[short] = tensor
            if short != "m":
                raw[module]["kind"] = kind
        elif name.endswith(".base_layer.weight") and name.split(".")[-3] in VOCABULARY:
            base[name.removesuffix(".base_layer.weight")] = tensor
        else:
            saved[_parameter(name, config, path)] = tensor
    if not raw:
        raise AdapterMismatch(f"{path.parent} holds no low-rank tensors")
    return Found(config, path, {module: _pair(module, parts, config, path) for module, parts in raw.items()}, saved, base)


def _parameter(name: str, config: Mapping[str, Any], path: Path) -> str:
    """The path of a parameter that was trained as a whole."""
    plain = name.replace(".base_layer.", ".")
    bias = config["bias"] != "none" and plain.endswith(".bias")
    vocabulary = name.endswith(".weight") and name.split(".")[-2] in VOCABULARY  # saved by PEFT when the vocabulary was resized
    if not (bias or vocabulary or (plain == name and saved_module(name, config["modules_to_save"] or ()))):
        raise AdapterMismatch(f"tensor {PREFIX}{name} is neither a low-rank factor nor part of a module that {path} names as saved")
    return plain


def _pair(module: str, parts: dict[str, Any], config: Mapping[str, Any], path: Path) -> Pair:
    needed = {"kind", "A", "B"} | ({"E"} if config["peft_type"] == "ADALORA" else set()) | ({"m"} if config["use_dora"] else set())
    if set(parts) != needed:
        odd = sorted(needed ^ set(parts))
        raise AdapterMismatch(f"module {module!r} has the tensors {sorted(set(parts) - {'kind'})}; {path} needs them with or without {odd}")
    _check_shapes(module, parts)
    return SCALED[config["peft_type"]](module, parts, config, path)


def _check_shapes(module: str, parts: Mapping[str, Any]) -> None:
    A, B = parts["A"], parts["B"]
    pair = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
    if not pair or ("E" in parts and parts["E"].shape != (len(A), 1)) or ("m" in parts and parts["m"].shape != (len(B),)):
        shapes = {name: tuple(t.shape) for name, t in parts.items() if name != "kind"}
        raise AdapterMismatch(f"the tensors of module {module!r} do not fit each other: {shapes}")


def _scaled(module: str, parts: dict[str, Any], config: Mapping[str, Any], path: Path) -> Pair:
    r, s = rank_in(config).named(module)
    if len(parts["A"]) != r:
        raise AdapterMismatch(f"module {module!r} has {len(parts['A'])} ranks, and {path} gives it r={r}")
    return Pair(s=s, **parts)


def _triplets(module: str, parts: dict[str, Any], config: Mapping[str, Any], path: Path) -> Pair:
    """The file holds the triplets that are left; the others come back as zeros."""
    r = config["init_r"]
    mask = (config["rank_pattern"] or {}).get(f"{module}.lora_E", [True] * r)
    if len(mask) != r or sum(mask) != len(parts["A"]):
        raise AdapterMismatch(
            f"module {module!r} has {len(parts['A'])} triplets; {path} keeps {sum(mask)} of {len(mask)}, init_r being {r}"
        )
    kept = torch.tensor([i for i, keep in enumerate(mask) if keep], dtype=torch.int64)
    A, B, E = (_back(parts[name], kept, r, dim) for name, dim in (("A", 0), ("B", 1), ("E", 0)))
    return Pair(parts["kind"], A, B, RULES["guarded"](r, config["lora_alpha"]), E=E)


SCALED: dict[str, Callable[[str, dict[str, Any], Mapping[str, Any], Path], Pair]] = {"LORA": _scaled, "ADALORA": _triplets}
"""By peft_type: the pair with its scale."""


def _back(tensor: Tensor, kept: Tensor, r: int, dim: int) -> Tensor:
    """The tensor with r ranks along `dim`, zero where none was kept."""
    shape = [r if d == dim else n for d, n in enumerate(tensor.shape)]
    return tensor.new_zeros(shape).index_copy(dim, kept, tensor)
