"""An adapter written as a folder that PEFT loads: adapter_config.json, adapter_model.safetensors, and lorakit.json beside them.

With lorakit.json, which says what the adapter was, the folder reads back as the very same adapter, recipe included. Nothing here touches
the network.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.folder import locate, write_files
from lorakit.adapters.peft_config import CONFIG, DEFAULTS, DETERMINED, HARMLESS, check_config
from lorakit.adapters.peft_files import SIDE, WEIGHTS, digests
from lorakit.adapters.peft_form import Form, form_of
from lorakit.adapters.peft_names import CONV1D, PREFIX, VOCABULARY, key_of, selected, targets
from lorakit.adapters.peft_rank import config_of, expressed, number, rank_in, trimmed
from lorakit.adapters.peft_saved import Saved, check_head, listed, saved_of
from lorakit.adapters.record import record_of, to_json
from lorakit.adapters.weights import floats, pack
from lorakit.core.adapter import Adapter
from lorakit.core.base import Transposed, base_of
from lorakit.core.errors import AdapterMismatch, CheckpointError, NotExportable, did_you_mean
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.site import sites_of


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
) -> Exported:
    """Write an adapter in PEFT's format. Raises NotExportable for what PEFT cannot hold, CheckpointError when the files cannot be written.

    native: PEFT's own type where it has one (DoRA, PiSSA, AdaLoRA); else the exact plain LoRA, which changes no base when PEFT loads it.
    svd_rank: what has no exact form is approximated at this rank, and the result says how far off it is.
    model: the base; needed for parts of fused weights and for changes that depend on W. With it lists of modules are shortest, else full.
    base_model, task_type: what PEFT's Auto classes ask for.
    save_embedding_layers: write the base weights of adapted embeddings too, as PEFT does (it needs them only if they were changed).
    """
    if locate(folder, "adapter.json") is not None:
        raise CheckpointError(f"{folder} holds an adapter in lorakit's format; write PEFT's to another folder")
    _fits(adapter, model)
    form = form_of(adapter, native=native, svd_rank=svd_rank, model=model)
    saved = saved_of(adapter, form.pairs, model)
    named = {k: v for k, v in (("base_model_name_or_path", base_model), ("task_type", task_type)) if v is not None}
    config = _config(adapter, form, saved, named, model)
    check_head(config["task_type"], saved)
    tensors = _tensors(adapter, form, saved) | (_base_weights(form, model) if save_embedding_layers else {})
    files = {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), WEIGHTS: pack(floats(tensors))}
    side = {"adapter": record_of(adapter), "files": digests(files), "restorable": form.restorable}
    return Exported(write_files(folder, {**files, SIDE: to_json(side)}), form.peft_type, form.errors, form.total)


def _fits(adapter: Adapter, model: nn.Module | None) -> None:
    here = {s.name: s for s in sites_of(model)} if model is not None else {s.name: s for s in adapter.sites}
    for site in adapter.sites:
        found = here.get(site.name)
        if found is None or (found.d_in, found.d_out, found.rows) != (site.d_in, site.d_out, site.rows):
            shape = f"{site.d_out} × {site.d_in}"
            raise AdapterMismatch(f"the adapter's site {site.name!r} ({shape}) is not in this model. {did_you_mean(site.name, here)}")


# -------------------------------------------------------------------------------------------------------------------- the tensors
def _tensors(adapter: Adapter, form: Form, saved: Saved) -> dict[str, Tensor]:
    pairs = {
        key_of(module, name, form.peft_type, pair.kind): tensor
        for module, pair in form.pairs.items()
        for name in ("A", "B", "E", "m")
        if (tensor := getattr(pair, name)) is not None
    }
    return pairs | {saved.biases.get(name, PREFIX + name): tensor for name, tensor in adapter.unfrozen().items()}


def _base_weights(form: Form, model: nn.Module | None) -> dict[str, Tensor]:
    if model is None:
        raise NotExportable("save_embedding_layers needs the base: give the model")
    modules = [name for name in form.pairs if name.split(".")[-1] in VOCABULARY]
    return {f"{PREFIX}{name}.base_layer.weight": model.get_submodule(name).weight.detach() for name in modules}  # type: ignore[operator]


# -------------------------------------------------------------------------------------------------------------- the configuration
def _config(adapter: Adapter, form: Form, saved: Saved, named: Mapping[str, str], model: nn.Module | None) -> dict[str, Any]:
    """The defaults; over them what the PEFT folder said that the adapter came from; over that what the adapter itself says."""
    carried = _carried(adapter, form.peft_type)
    config = {**DEFAULTS[form.peft_type], **carried, **named}
    config["init_lora_weights"] = config["init_lora_weights"] if config["init_lora_weights"] in HARMLESS else True
    config["modules_to_save"] = listed(saved, config["modules_to_save"], model)
    config |= {"bias": saved.bias, "lora_dropout": _dropout(adapter), "fan_in_fan_out": any(_is_conv1d(name, model) for name in form.pairs)}
    config |= {name: number(value) if isinstance(value, float) else value for name, value in form.fields.items()}
    config |= SAID[form.peft_type](form, carried)
    if not selected(config, form.pairs, model):
        config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config["target_modules"] = targets(form.pairs, model)
    if config["task_type"] is None and config["auto_mapping"] is None and model is not None:
        kind = model.__class__
        config["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def _carried(adapter: Adapter, peft_type: str) -> dict[str, Any]:
    """Fields of the configuration that the adapter was once read from."""
    before = adapter.meta.get("peft")
    if not isinstance(before, dict) or before.get("peft_type") != peft_type:
        return {}
    known = check_config(before, Path("the adapter's meta"))
    return {name: known[name] for name in set(known) & set(DEFAULTS[peft_type]) - DETERMINED}


def _ranks(form: Form, carried: Mapping[str, Any]) -> dict[str, Any]:
    preferred = ([rank_in(carried)] if carried else []) + ([trimmed(form.rank, form.pairs)] if form.rank is not None else [])
    return config_of(expressed({name: (pair.r, pair.s) for name, pair in form.pairs.items()}, *preferred))


def _schedule(form: Form, carried: Mapping[str, Any]) -> dict[str, Any]:
    """A finished adapter has no schedule left, but PEFT refuses to load one without a number of steps that fits it."""
    init_r, target_r = form.fields["init_r"], form.fields["target_r"]
    steps = max(carried.get("total_step") or 0, form.fields["tinit"] + form.fields["tfinal"] + 1)
    said = carried.get("target_r", target_r)  # PEFT lets it exceed the initial rank
    return {"total_step": steps, "target_r": said if min(said, init_r) == target_r else target_r}


SAID: dict[str, Callable[[Form, Mapping[str, Any]], dict[str, Any]]] = {"LORA": _ranks, "ADALORA": _schedule}
"""What a form says in the fields of its type, as far as possible in the words that its configuration once used."""


def _dropout(adapter: Adapter) -> float:
    spec = adapter.method().delta
    return spec.dropout if isinstance(spec, LowRankSpec) else 0.0


def _is_conv1d(name: str, model: nn.Module | None) -> bool:
    if model is None:
        return name.split(".")[-1] in CONV1D
    return isinstance(base_of(model.get_submodule(name)), Transposed)
