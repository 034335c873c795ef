"""An adapter written as a folder that PEFT loads: adapter_config.json, adapter_model.safetensors, and lorakit.json beside them.

With lorakit.json, which says what the adapter was, the folder reads back as the very same adapter, recipe included. Nothing here touches
the network.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.folder import locate, write_files
from lorakit.adapters.peft_config import CONFIG, check_config
from lorakit.adapters.peft_experts import parameter_fields, refuse_taken, targets_of
from lorakit.adapters.peft_fields import COMMON, DETERMINED
from lorakit.adapters.peft_files import SIDE, WEIGHTS, digests
from lorakit.adapters.peft_form import form_of
from lorakit.adapters.peft_names import PREFIX, SHARED, VOCABULARY, is_conv1d, key_of, selected, targets
from lorakit.adapters.peft_rank import number
from lorakit.adapters.peft_saved import Saved, check_head, listed, saved_of
from lorakit.adapters.peft_type import Form, Table, argument
from lorakit.adapters.peft_types import FOLDER_OF, FOLDERS, TYPES
from lorakit.adapters.record import record_of, to_json
from lorakit.adapters.weights import floats, pack
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch, CheckpointError, NotExportable, did_you_mean
from lorakit.core.method import describe
from lorakit.core.site import MODULES, sites_of


@dataclass(frozen=True)
class Exported:
    """What was written. `errors`: the relative error of each site's change of the weight; empty where the form is exact."""

    folder: Path
    peft_type: str
    errors: Mapping[str, float] = field(default_factory=dict)
    total: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        if not self.errors:
            return [f"{self.peft_type}, exact"]
        worst = sorted(self.errors.items(), key=lambda item: -item[1])
        return [f"{name}: relative error {error:.2e}" for name, error in worst] + [f"in total: relative error {self.total:.2e}"]


def to_peft(
    adapter: Adapter,
    folder: str | Path,
    *,
    native: bool = True,
    svd_rank: int | None = None,
    model: nn.Module | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    save_embedding_layers: bool = False,
    before_0_19: bool = False,
) -> Exported:
    """Write an adapter in PEFT's format. Raises NotExportable for what PEFT cannot hold, CheckpointError when the files cannot be written.

    native: PEFT's own type where it has one (DoRA, AdaLoRA, VeRA, …); else the exact plain LoRA, which changes no base when PEFT loads it.
    svd_rank: what has no exact form is approximated at this rank, and the result says how far off it is.
    model: the base; needed for parts of fused weights and for changes that depend on W. With it lists of modules are shortest, else full.
    base_model, task_type: what PEFT's Auto classes ask for.
    save_embedding_layers: write the base weights of adapted embeddings too, as PEFT does (it needs them only if they were changed).
    before_0_19: write experts as PEFT did before version 0.19, whose files later ones do not load.
    """
    if locate(folder, "adapter.json") is not None:
        raise CheckpointError(f"{folder} holds an adapter in lorakit's format; write PEFT's to another folder")
    _fits(adapter, model)
    named = {k: v for k, v in (("base_model_name_or_path", base_model), ("task_type", task_type)) if v is not None}
    if adapter.recipe.name in FOLDER_OF:
        kind = FOLDERS[FOLDER_OF[adapter.recipe.name]]

        def one(inside: Adapter, where: Path) -> Exported:
            return to_peft(inside, where, model=model, base_model=base_model, task_type=task_type)

        return Exported(write_files(folder, kind.write(adapter, Path(folder), {**COMMON, **named}, one)), kind.table.name)
    form = form_of(adapter, native=native, svd_rank=svd_rank, model=model)
    saved = saved_of(adapter, form.modules, model)
    old = _old(form, model) if before_0_19 else None
    config = _config(adapter, form, saved, named, model, old=before_0_19)
    check_head(config["task_type"], saved)
    tensors = _tensors(adapter, form, saved, old) | (_base_weights(form, model) if save_embedding_layers else {})
    files = {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), WEIGHTS: pack(floats(tensors))}
    side = {"adapter": record_of(adapter), "files": digests(files), "restorable": form.restorable and old is None}
    return Exported(write_files(folder, {**files, SIDE: to_json(side)}), form.peft_type, form.errors, form.total)


def _fits(adapter: Adapter, model: nn.Module | None) -> None:
    here = {s.name: s for s in sites_of(model)} if model is not None else {s.name: s for s in adapter.sites}
    for site in adapter.sites:
        found = here.get(site.name)
        if found is None or (found.d_in, found.d_out, found.rows, found.experts) != (site.d_in, site.d_out, site.rows, site.experts):
            shape = f"{site.d_out} × {site.d_in}"
            raise AdapterMismatch(f"the adapter's site {site.name!r} ({shape}) is not in this model. {did_you_mean(site.name, here)}")


# -------------------------------------------------------------------------------------------------------------------- the tensors
def _tensors(adapter: Adapter, form: Form[Any], saved: Saved, old: Collection[str] | None) -> dict[str, Tensor]:
    table = TYPES[form.peft_type].table
    modules = {
        key_of(path, name, table.keys, kind): tensor
        for path, (kind, tensors) in TYPES[form.peft_type].placed(form, old=old or ()).items()
        for name, tensor in tensors.items()
    }  # fmt: skip
    shared = {SHARED + table.shared[name]: tensor for name, tensor in form.shared.items()}
    return modules | shared | {saved.biases.get(name, PREFIX + name): tensor for name, tensor in adapter.unfrozen().items()}


def _old(form: Form[Any], model: nn.Module | None) -> set[str]:
    """The stacks that the layout before 0.19 turned over: all but those stored transposed."""
    if model is None:
        raise NotExportable("before_0_19 needs the base, to know how its experts are stored: give the model")
    return {site.name for site, transposed in targets_of(model, ()).items() if not transposed and site.name in form.modules}


def _base_weights(form: Form[Any], model: nn.Module | None) -> dict[str, Tensor]:
    if model is None:
        raise NotExportable("save_embedding_layers needs the base: give the model")
    modules = [name for name in form.modules if name.split(".")[-1] in VOCABULARY]
    return {f"{PREFIX}{name}.base_layer.weight": model.get_submodule(name).weight.detach() for name in modules}  # type: ignore[operator]


# -------------------------------------------------------------------------------------------------------------- the configuration
def _config(
    adapter: Adapter, form: Form[Any], saved: Saved, named: Mapping[str, str], model: nn.Module | None, *, old: bool
) -> dict[str, Any]:
    """The defaults; over them what the PEFT folder said that the adapter came from; over that what the adapter itself says."""
    parameters = _parameters(form)
    modules = [name for name in form.modules if name not in parameters]
    refuse_taken(modules, model)
    kind = TYPES[form.peft_type]
    carried = _carried(adapter, kind.table)
    config = {**kind.table.config, **carried, **named}
    config["modules_to_save"] = listed(saved, config["modules_to_save"], model)
    config |= {name: value for name, value in _determined(adapter, form, saved, kind.table, model).items() if name in config}
    config |= {name: number(value) if isinstance(value, float) else value for name, value in form.fields.items()}
    config |= kind.said(form, carried)
    if not selected(config, modules, model):
        config |= {name: None for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if name in config}
        config["target_modules"] = targets(modules, model)
    config |= parameter_fields(config, parameters, model, old=old) if "target_parameters" in config else {}
    if config["task_type"] is None and config["auto_mapping"] is None and model is not None:
        base = model.__class__
        config["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return config


def _parameters(form: Form[Any]) -> list[str]:
    """Those of the modules that PEFT adapts as parameters, without any dropout."""
    return [name for name, held in form.modules.items() if held.kind not in MODULES]


def _determined(adapter: Adapter, form: Form[Any], saved: Saved, table: Table, model: nn.Module | None) -> dict[str, Any]:
    if saved.biases and table.bias is None:
        raise NotExportable(f"PEFT's {table.name} has no place for the biases that this adapter trained; write plain LoRA (--plain)")
    fields = {
        "bias": saved.bias(table.bias or "none"),
        "fan_in_fan_out": any(is_conv1d(name, model) for name in set(form.modules) - set(_parameters(form))),
    }
    return fields if table.dropout is None else {**fields, table.dropout: 0.0 if _parameters(form) else _dropout(adapter)}


def _carried(adapter: Adapter, table: Table) -> dict[str, Any]:
    """Fields of the configuration that the adapter was once read from."""
    before = adapter.meta.get("peft")
    if not isinstance(before, dict) or before.get("peft_type") != table.name:
        return {}
    known = check_config(before, Path("the adapter's meta"))
    return {name: known[name] for name in set(known) & set(table.config) - DETERMINED}


def _dropout(adapter: Adapter) -> float:
    return float(argument(adapter, "dropout")) if "dropout" in describe(adapter.recipe.name).parameters else 0.0
