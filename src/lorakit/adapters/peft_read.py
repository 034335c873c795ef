"""A PEFT folder read as an adapter: as the very one that lorakit wrote, or else by the recipe that is closest to its configuration.

The tensors say which modules are adapted; the configuration must agree. PiSSA's A₀, B₀ are not in the file: they come from the base.
"""

from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.folder import locate
from lorakit.adapters.io import check, load_adapter, read_weights
from lorakit.adapters.peft_config import CONFIG, read_config
from lorakit.adapters.peft_experts import targets_of
from lorakit.adapters.peft_fields import DETERMINED
from lorakit.adapters.peft_files import WEIGHTS, Side, digests, read_side, sorted_out
from lorakit.adapters.peft_recipe import closest
from lorakit.adapters.peft_type import Found
from lorakit.adapters.peft_types import FOLDERS, TYPES
from lorakit.adapters.record import read_bounded, recipe_in
from lorakit.adapters.weights import unpack
from lorakit.core.adapter import UNFROZEN, Adapter
from lorakit.core.errors import AdapterMismatch, CheckpointError
from lorakit.core.method import Recipe, get_method
from lorakit.core.site import Site


def from_peft(folder: str | Path, *, model: nn.Module | None = None) -> Adapter:
    """The adapter in a PEFT folder. The model is needed for one that lorakit did not write, and for PiSSA.

    Raises NotExportable for types and settings that lorakit has no form for, CheckpointError for files that cannot be read, and
    AdapterMismatch for tensors that do not fit their configuration or the model.
    """
    folder = Path(folder)
    mixed = _mixed(folder, model)
    if mixed is not None:
        return check(mixed)
    found, side = _read(folder, model)
    if side is not None and side.restorable:
        return check(_restored(found, side, model))
    if model is None:
        raise CheckpointError(f"{folder} is PEFT's and does not say what its modules are: give the model it is for (--model)")
    nearest = closest(found, model)
    kept = {k: v for k, v in found.config.items() if k not in DETERMINED or k == "peft_type"}
    meta = {**(side.record.meta if side is not None else {}), "peft": kept}
    return check(_assembled(nearest.recipe, nearest.sites, nearest.found, meta, model))


def _mixed(folder: Path, model: nn.Module | None) -> Adapter | None:
    """An adapter of a type whose folder holds others, read whole; None for other types."""
    path, weights = locate(folder, CONFIG), locate(folder, WEIGHTS)
    config = None if path is None else read_config(read_bounded(path), path)
    if path is None or config is None or config["peft_type"] not in FOLDERS:
        return None
    if model is None:
        raise CheckpointError(f"{folder} is PEFT's and does not say what its modules are: give the model it is for (--model)")
    tensors = unpack(read_weights(weights, folder, WEIGHTS), weights or folder)
    return FOLDERS[config["peft_type"]].read(config, tensors, path, model, lambda inside: load_adapter(inside, model=model))


def _read(folder: Path, model: nn.Module | None) -> tuple[Found[Any], Side | None]:
    path, weights = locate(folder, CONFIG), locate(folder, WEIGHTS)
    if path is None:
        raise CheckpointError(f"{folder} has no {CONFIG}")
    raw = read_bounded(path)
    config = read_config(raw, path)
    data = read_weights(weights, folder, WEIGHTS)
    side = read_side(folder, digests({CONFIG: raw, WEIGHTS: data}))
    known = [s.site() for s in side.record.sites] if side is not None and side.restorable else []
    targets = targets_of(model, known)
    if config.get("target_parameters") and model is None and not (targets and all(site.rows is None for site in targets)):
        raise CheckpointError(f"{folder} adapts experts: give the model it is for (--model) to know the shapes of their weights")
    return sorted_out(config, unpack(data, weights or folder), path, targets), side


def _assembled(recipe: Recipe, sites: tuple[Site, ...], found: Found[Any], meta: dict[str, Any], model: nn.Module | None) -> Adapter:
    method = get_method(recipe.name, **recipe.kwargs)
    whole = {UNFROZEN + name: tensor for name, tensor in found.saved.items()}
    tensors = TYPES[found.config["peft_type"]].tensors(found, method, sites, model)
    return Adapter(recipe, sites, whole | tensors, meta)


def _restored(found: Found[Any], side: Side, model: nn.Module | None) -> Adapter:
    """The very adapter that was written."""
    recipe, sites = recipe_in(side.record, side.path), tuple(s.site() for s in side.record.sites)
    if {s.whole for s in sites} != set(found.modules):
        raise AdapterMismatch(f"{side.path} names other modules than the tensors beside it")
    return _assembled(recipe, sites, found, side.record.meta, model)
