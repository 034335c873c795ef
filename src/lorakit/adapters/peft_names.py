"""Names in PEFT's folders: the keys of tensors, and the lists that say which modules are adapted.

    base_model.model.<module>.<end>          one module's tensor
    base_model.<name>                        what the modules share
    base_model.model.<parameter>             trained as a whole

Ends and names are in each type's table.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lorakit.core.site import Kind, _is_conv1d, ours

PREFIX = "base_model.model."
SHARED = "base_model."

Keys = Mapping[Kind, Mapping[str, str]]
"""Short tensor name -> end of the key, by kind of module: a type's table."""

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that PEFT expects to be saved whole under a task type, where the model has them."""
VOCABULARY = ("embed_tokens", "lm_head")
"""The only names whose base weights PEFT saves beside an adapter on them."""
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Last names of Transformers' Conv1D modules; where one of them is a Linear, PEFT corrects itself."""


def key_of(module: str, name: str, keys: Keys, kind: Kind) -> str:
    """The key of one tensor of one module."""
    return f"{PREFIX}{module}.{keys[kind][name]}"


def is_conv1d(name: str, model: nn.Module | None) -> bool:
    """Whether a module is Transformers' Conv1D; without a model, judged by its name."""
    if model is None:
        return name.split(".")[-1] in CONV1D
    return _is_conv1d(model.get_submodule(name))


def parsed(key: str, keys: Keys) -> tuple[str, list[Kind], str] | None:
    """(module, kinds of module that have this tensor, its short name) of a key, or None when it is no module's."""
    for name, end in {pair: None for names in keys.values() for pair in names.items()}:
        if key.endswith("." + end):
            return key[: -len(end) - 1], [kind for kind, names in keys.items() if names.get(name) == end], name
    return None


def module_names(model: nn.Module) -> list[str]:
    """Every module's path, adapters left out."""
    return [name for name, _ in model.named_modules() if name and not ours(name)]


def suffixes(name: str) -> list[str]:
    """The ends of a dotted name, on dots, shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def targets(names: Collection[str], model: nn.Module | None) -> list[str] | str:
    """The shortest sorted list of suffixes that matches these modules and no other of the model; full names without a model.

    Where no list can do it (one name is the end of another's), a regular expression of all names.
    """
    others = set(module_names(model)) - set(names) if model is not None else set()
    found = shortest(names, others, whole=model is None)
    return "|".join(re.escape(n) for n in sorted(names)) if found is None else found


def shortest(names: Collection[str], others: Collection[str], *, whole: bool) -> list[str] | None:
    """The shortest sorted list of suffixes (`whole`: of names) that means these names and none of the others; None where none does."""
    taken = {end for other in others for end in suffixes(other)}
    chosen: list[str] = []
    for name in sorted(names):
        if not any(matches_entry(entry, name) for entry in chosen):
            free = [end for end in suffixes(name) if end not in taken]
            if not free:
                return None
            chosen.append(name if whole else free[0])
    return sorted(chosen)


def matches_entry(entry: str, name: str) -> bool:
    """Whether a list's entry means this module: its name or the end of it, on a dot."""
    return name == entry or name.endswith("." + entry)


def matches(config: Mapping[str, Any], name: str) -> bool:
    """PEFT's own rule of whether a configuration adapts a module."""
    if _listed(config.get("exclude_modules"), name):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in config.get("modules_to_save") or ()):
        return False
    wanted = config["target_modules"]
    exact = not isinstance(wanted, str) and name in wanted
    return exact or (_listed(wanted, name) and _in_layers(config, name))


def _listed(entries: str | Iterable[str] | None, name: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(matches_entry(entry, name) for entry in entries or ())


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """`layers_to_transform`: the first number after a dot, or after one of `layers_pattern`."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    found = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for m in (re.match(p, name) for p in found) if m), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def saved_module(parameter: str, entries: Iterable[str]) -> str | None:
    """The module of `modules_to_save` that a parameter belongs to: the highest whose path ends with an entry, as PEFT looks for it."""
    prefixes = [parameter[:i] for i, c in enumerate(parameter) if c == "."]
    return next((p for p in prefixes if any(p.endswith(entry) for entry in entries)), None)


def selected(config: Mapping[str, Any], names: Collection[str], model: nn.Module | None) -> bool:
    """Whether a configuration's selection of modules means exactly these."""
    if config.get("target_modules") is None or not all(matches(config, name) for name in names):
        return False
    return model is None or {name for name in module_names(model) if matches(config, name)} == set(names)
