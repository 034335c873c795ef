"""Parameters trained as a whole, beside the pairs, as PEFT can hold them: whole modules (`modules_to_save`), or single biases (`bias`)."""

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.peft_names import HEADS, PREFIX, matches_entry, module_names, saved_module
from lorakit.core.adapter import Adapter
from lorakit.core.errors import NotExportable


@dataclass(frozen=True)
class Saved:
    """Paths of whole modules, and the key of each bias that was trained alone."""

    modules: list[str]
    biases: dict[str, str]

    def bias(self, own: str) -> str:
        """The field that tells PEFT which biases there are; `own`: the type's word for those of adapted modules alone."""
        if not self.biases:
            return "none"
        return own if all(key.endswith(".base_layer.bias") for key in self.biases.values()) else "all"


def saved_of(adapter: Adapter, adapted: Collection[str], model: nn.Module | None) -> Saved:
    """What an adapter trained as a whole, `adapted` being its modules with pairs. Raises NotExportable for what PEFT saves no place for."""
    parameters = adapter.unfrozen()
    homes = {name: _home(name, adapter, parameters, model) for name in parameters}
    biases = {name: _bias_key(name, adapted) for name, home in homes.items() if home is None and name.endswith(".bias")}
    stray = [name for name, home in homes.items() if home is None and name not in biases]
    if stray:
        unknown = "; give the base (--model), which says what is whole" if model is None else ""
        what = f"{len(stray)} trained parameters ({stray[0]}, …) are not whole modules or biases"
        raise NotExportable(f"{what}, and PEFT saves nothing else{unknown}")
    modules = sorted({home for home in homes.values() if home is not None})
    modules = [name for name in modules if not any(name.startswith(other + ".") for other in modules)]
    _check_whole(modules, parameters, adapted, model)
    return Saved(modules, biases)


def _home(parameter: str, adapter: Adapter, parameters: Mapping[str, Tensor], model: nn.Module | None) -> str | None:
    """The module that was unfrozen whole and holds the parameter: the highest that a pattern of the recipe names."""
    prefixes = [parameter[:i] for i, c in enumerate(parameter) if c == "."]
    patterns = [entry for entry in adapter.method().unfreeze if isinstance(entry, str)]
    named = [p for p in prefixes for entry in patterns if matches_entry(entry, p) or fnmatch.fnmatchcase(p, entry)]
    if named or not prefixes:
        return named[0] if named else None
    whole = model is not None and all(f"{prefixes[-1]}.{k}" in parameters for k in model.get_submodule(prefixes[-1]).state_dict())
    return prefixes[-1] if whole else None


def _bias_key(name: str, adapted: Collection[str]) -> str:
    """An adapted module's own bias is its base layer's."""
    module = name.removesuffix(".bias")
    return f"{PREFIX}{module}.base_layer.bias" if module in adapted else PREFIX + name


def _check_whole(modules: list[str], parameters: Mapping[str, Tensor], adapted: Collection[str], model: nn.Module | None) -> None:
    for module in modules:
        inside = [name for name in adapted if _lies_in(name, module)]
        if inside:
            raise NotExportable(f"site {inside[0]!r} lies in {module!r}, which is trained as a whole; PEFT has no form for both")
        kept = [k for k in model.get_submodule(module).state_dict() if f"{module}.{k}" not in parameters] if model is not None else []
        if kept:
            raise NotExportable(f"PEFT would expect {module}.{kept[0]} to be trained with the rest of {module!r}, and it is not")


def _lies_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def listed(saved: Saved, before: list[str] | None, model: nn.Module | None) -> list[str] | None:
    """`modules_to_save`: the list as it was, when it still means these modules; else their names."""
    if before and saved.modules and all(saved_module(name + ".", before) == name for name in saved.modules):
        return before
    for other in module_names(model) if model is not None else []:
        if any(other.endswith(name) and not _lies_in(other, name) for name in saved.modules):
            raise NotExportable(f"PEFT would take {other!r} for one of the modules that were trained whole ({', '.join(saved.modules)})")
    return saved.modules or None


def check_head(task_type: Any, saved: Saved) -> None:
    """Under some task types PEFT expects a trained head in the file. Raises NotExportable when there is none."""
    heads = HEADS.get(task_type, ())
    if heads and not any(module.endswith(heads) for module in saved.modules):
        raise NotExportable(
            f"under task_type {task_type} PEFT loads a trained head ({' or '.join(heads)}), and this adapter has none: "
            "train one (unfreeze), or leave task_type out"
        )
