"""The recipe that is closest to a PEFT configuration, for adapters that lorakit did not write.

LoRA+, LoRA-FA and the random inits leave no trace in PEFT's files: they come back as LoRA, which computes the same.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorakit.adapters.peft_names import matches, module_names, saved_module, shortest
from lorakit.adapters.peft_type import Found
from lorakit.adapters.peft_types import TYPES
from lorakit.core.errors import AdapterMismatch, did_you_mean
from lorakit.core.method import Recipe, get_method
from lorakit.core.site import MODULES, Site, Where, ours, select, sites_of


@dataclass(frozen=True)
class Closest:
    """A recipe, its sites in the model's order, and what the folder holds, as the recipe needs it."""

    recipe: Recipe
    sites: tuple[Site, ...]
    found: Found[Any]


def closest(found: Found[Any], model: nn.Module) -> Closest:
    """Raises AdapterMismatch for modules and parameters that the model lacks, or that the configuration does not name."""
    kind = TYPES[found.config["peft_type"]]
    sites = _sites(found, model)
    _check_base(found, model)
    name, kwargs, modules = kind.closest(found, sites)
    dropout = {} if kind.table.dropout is None else {"dropout": float(found.config[kind.table.dropout])}
    unfreeze = _unfreeze(found, model)
    recipe = get_method(name, **kwargs, **dropout, sites=_where(sites, model), **({"unfreeze": unfreeze} if unfreeze else {})).recipe
    assert recipe is not None
    return Closest(recipe, sites, replace(found, modules=dict(modules)))


# ------------------------------------------------------------------------------------------------------------ sites and whole modules
def _sites(found: Found[Any], model: nn.Module) -> tuple[Site, ...]:
    here = {s.name: s for s in sites_of(model) if s.rows is None}
    for module, held in found.modules.items():
        if module not in here or here[module].kind != held.kind:
            raise AdapterMismatch(f"the adapter has a {held.kind} module {module!r} that this model lacks. {did_you_mean(module, here)}")
        if held.kind in MODULES and found.config["target_modules"] not in (None, "all-linear") and not matches(found.config, module):
            raise AdapterMismatch(f"there are tensors for {module!r}, but {found.path} does not name that module; PEFT would ignore them")
    if not TYPES[found.config["peft_type"]].table.identity and found.config["target_modules"] not in (None, "all-linear"):
        bare = [name for name, site in here.items() if site.kind == "linear" and name not in found.modules and matches(found.config, name)]
        if bare:
            raise AdapterMismatch(f"{found.path} adapts {bare[0]!r}, and there are no tensors for it; PEFT would start it at random")
    return tuple(site for name, site in here.items() if name in found.modules)


def _where(sites: tuple[Site, ...], model: nn.Module) -> Where:
    """The sites as a person would name them, or all their names."""
    names = [s.name for s in sites]
    others = {*module_names(model), *(name for name, _ in model.named_parameters() if not ours(name))} - set(names)
    where = shortest(names, others, whole=False) or f"re:{'|'.join(map(re.escape, sorted(names)))}"
    return where if [s.name for s in select(model, where)] == names else names


def _unfreeze(found: Found[Any], model: nn.Module) -> tuple[str, ...]:
    """The modules and biases that were trained whole, in the model's order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in found.saved.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "nothing of that name"
            raise AdapterMismatch(f"the adapter holds the whole parameter {name} {tuple(tensor.shape)}; this model has {shape}")
    return tuple(dict.fromkeys(_home(name, found, model) for name in parameters if name in found.saved))


def _home(parameter: str, found: Found[Any], model: nn.Module) -> str:
    """The module that was saved whole, or the parameter itself."""
    module = parameter.rpartition(".")[0]
    whole = all(f"{module}.{name}" in found.saved for name in model.get_submodule(module).state_dict())
    return saved_module(parameter, found.config["modules_to_save"] or ()) or (module if whole else parameter)


def _check_base(found: Found[Any], model: nn.Module) -> None:
    """PEFT saves the base weights of adapted embeddings; loading them would change the base, so they must be the base's."""
    for module, saved in found.base.items():
        here = model.get_submodule(module).weight.detach().cpu()  # type: ignore[operator]
        if saved.shape != here.shape or not torch.equal(saved.to(here.dtype), here.to(saved.dtype).to(here.dtype)):
            raise AdapterMismatch(
                f"the folder brings a base weight for {module!r}, as PEFT saves it beside an adapted embedding; it is not this model's: "
                "the vocabulary was resized, or the base trained, before; load that base first"
            )
