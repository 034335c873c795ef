"""The recipe that is closest to a PEFT configuration, for adapters that lorakit did not write.

LoRA+, LoRA-FA and the random inits leave no trace in PEFT's files: they come back as LoRA, which computes the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.adapters.pair import Pair
from lorakit.adapters.peft_files import Found
from lorakit.adapters.peft_names import matches, saved_module, targets
from lorakit.adapters.peft_rank import expressed, rank_in, trimmed
from lorakit.core.errors import AdapterMismatch, did_you_mean
from lorakit.core.method import Recipe, get_method
from lorakit.core.site import Site, Where, select, sites_of


@dataclass(frozen=True)
class Closest:
    """A recipe, its sites in the model's order, and their pairs by site name."""

    recipe: Recipe
    sites: tuple[Site, ...]
    pairs: dict[str, Pair]


def closest(found: Found, model: nn.Module) -> Closest:
    """Raises AdapterMismatch for modules and parameters that the model lacks, or that the configuration does not name."""
    sites = _sites(found, model)
    _check_base(found, model)
    pairs = {site.name: found.pairs[site.name] for site in sites}
    name, kwargs, pairs = MAKERS[found.config["peft_type"]](found.config, sites, pairs)
    shared = {"dropout": float(found.config["lora_dropout"]), "sites": _where(sites, model), "unfreeze": _unfreeze(found, model)}
    recipe = get_method(name, **kwargs, **{k: v for k, v in shared.items() if k != "unfreeze" or v}).recipe
    assert recipe is not None
    return Closest(recipe, sites, pairs)


# ----------------------------------------------------------------------------------------------------------------------- by type
def _lora(config: dict[str, Any], sites: tuple[Site, ...], pairs: dict[str, Pair]) -> tuple[str, dict[str, Any], dict[str, Pair]]:
    """LoRA, rsLoRA, DoRA or PiSSA."""
    pairs = {site.name: _fitted(pairs[site.name], site) for site in sites}
    special = (config["use_dora"], config["init_lora_weights"] == "pissa")
    said = trimmed(rank_in(config), pairs)
    preferred = [] if any(special) and said.rule != "linear" else [said]  # those recipes know that rule only; it can say any scale
    rank = expressed({name: (pair.r, pair.s) for name, pair in pairs.items()}, *preferred)
    patterns = {"rank_pattern": dict(rank.rank_pattern), "alpha_pattern": dict(rank.alpha_pattern)}
    kwargs = {"r": rank.r, "alpha": float(rank.alpha), **{k: v for k, v in patterns.items() if v}}
    return RECIPES[special, rank.rule], kwargs, pairs


RECIPES = {
    ((False, False), "linear"): "lora",
    ((False, False), "sqrt"): "rslora",
    ((True, False), "linear"): "dora",
    ((False, True), "linear"): "pissa",
}
"""By (use_dora, PiSSA) and the rule of the scale."""


def _adalora(config: dict[str, Any], sites: tuple[Site, ...], pairs: dict[str, Pair]) -> tuple[str, dict[str, Any], dict[str, Pair]]:
    r = config["init_r"]
    schedule = {"tinit": config["tinit"], "tfinal": config["tfinal"], "delta_t": config["deltaT"]}
    smoothing = {"beta1": float(config["beta1"]), "beta2": float(config["beta2"]), "orth": float(config["orth_reg_weight"])}
    # PEFT lets the target exceed the initial rank, where it means nothing
    return "adalora", {"r": r, "target_r": min(config["target_r"], r), "alpha": float(config["lora_alpha"]), **schedule, **smoothing}, pairs


MAKERS: dict[str, Callable[..., tuple[str, dict[str, Any], dict[str, Pair]]]] = {"LORA": _lora, "ADALORA": _adalora}
"""By peft_type: name and arguments of the recipe, and the pairs as it needs them."""


def _fitted(pair: Pair, site: Site) -> Pair:
    """PEFT allows ranks beyond the matrix; the same B·A then has factors of its smaller side."""
    side = min(site.d_in, site.d_out)
    if pair.r <= side:
        return pair
    BA = (pair.B.double() @ pair.A.double()).to(pair.A.dtype)
    A, B = (BA, torch.eye(side)) if site.d_out <= site.d_in else (torch.eye(side), BA)
    return Pair(pair.kind, A, B, pair.s, m=pair.m)


# ------------------------------------------------------------------------------------------------------------ sites and whole modules
def _sites(found: Found, model: nn.Module) -> tuple[Site, ...]:
    here = {s.name: s for s in sites_of(model) if s.rows is None}
    for module, pair in found.pairs.items():
        if module not in here or here[module].kind != pair.kind:
            raise AdapterMismatch(f"the adapter has a {pair.kind} module {module!r} that this model lacks. {did_you_mean(module, here)}")
        if found.config["target_modules"] not in (None, "all-linear") and not matches(found.config, module):
            raise AdapterMismatch(f"there are tensors for {module!r}, but {found.path} does not name that module; PEFT would ignore them")
    return tuple(site for name, site in here.items() if name in found.pairs)


def _where(sites: tuple[Site, ...], model: nn.Module) -> Where:
    """The sites as a person would name them, or all their names."""
    names = [s.name for s in sites]
    short = targets(names, model)
    where = f"re:{short}" if isinstance(short, str) else short
    return where if [s.name for s in select(model, where)] == names else names


def _unfreeze(found: Found, model: nn.Module) -> tuple[str, ...]:
    """The modules and biases that were trained whole, in the model's order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in found.saved.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "nothing of that name"
            raise AdapterMismatch(f"the adapter holds the whole parameter {name} {tuple(tensor.shape)}; this model has {shape}")
    return tuple(dict.fromkeys(_home(name, found, model) for name in parameters if name in found.saved))


def _home(parameter: str, found: Found, model: nn.Module) -> str:
    """The module that was saved whole, or the parameter itself."""
    module = parameter.rpartition(".")[0]
    whole = all(f"{module}.{name}" in found.saved for name in model.get_submodule(module).state_dict())
    return saved_module(parameter, found.config["modules_to_save"] or ()) or (module if whole else parameter)


def _check_base(found: Found, model: nn.Module) -> None:
    """PEFT saves the base weights of adapted embeddings; loading them would change the base, so they must be the base's."""
    for module, saved in found.base.items():
        here = model.get_submodule(module).weight.detach().cpu()  # type: ignore[operator]
        if saved.shape != here.shape or not torch.equal(saved.to(here.dtype), here.to(saved.dtype).to(here.dtype)):
            raise AdapterMismatch(
                f"the folder brings a base weight for {module!r}, as PEFT saves it beside an adapted embedding; it is not this model's: "
                "the vocabulary was resized, or the base trained, before; load that base first"
            )
