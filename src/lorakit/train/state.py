"""A run's state as safetensors and JSON: nested dicts and lists whose tensors are replaced by references. No pickle."""

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lorakit.core.errors import CheckpointError

TENSOR, PAIRS = "$tensor", "$pairs"


def flatten(tree: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """The JSON form of `tree`; its tensors go into `tensors`. Dict keys that are not strings survive as pairs, tuples become lists."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().to("cpu", copy=True).contiguous()
        return {TENSOR: path}
    if isinstance(tree, dict):
        if all(isinstance(k, str) for k in tree):
            return {k: flatten(v, tensors, f"{path}/{k}") for k, v in tree.items()}
        return {PAIRS: [[k, flatten(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return [flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]
    return tree


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `flatten`."""
    if isinstance(tree, dict):
        if TENSOR in tree:
            return tensors[tree[TENSOR]]
        if PAIRS in tree:
            return {k: unflatten(v, tensors) for k, v in tree[PAIRS]}
        return {k: unflatten(v, tensors) for k, v in tree.items()}
    return [unflatten(v, tensors) for v in tree] if isinstance(tree, list) else tree


def write_state(folder: Path, tree: Any) -> None:
    """Write state.safetensors and state.json into an existing folder, synced to disk."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(flatten(tree, tensors), indent=1)
    (folder / "state.safetensors").write_bytes(save(tensors))  # not save_file, whose error on a full disk is no OSError
    (folder / "state.json").write_text(text, encoding="utf-8")
    for name in ("state.safetensors", "state.json"):
        with (folder / name).open("rb") as f:
            os.fsync(f.fileno())


def read_state(folder: Path) -> Any:
    """What `write_state` wrote. Raises CheckpointError."""
    try:
        return unflatten(json.loads((folder / "state.json").read_text(encoding="utf-8")), load_file(folder / "state.safetensors"))
    except Exception as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {error}; delete it to resume from the one before") from error


def random_state() -> dict[str, Any]:
    """The global generators that a model's own dropout may use."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Undo to `random_state`."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
