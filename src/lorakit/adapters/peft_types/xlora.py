"""XLORA: a gate's MLP, and each of its LoRAs in a folder of its own.

    base_model.internal_xlora_classifier.layers.<j>.weight · .bias        j counts ReLU and dropout, too
    adapter_config.json: {"adapters": {"0": folder, "1": folder, ..}}      PEFT activates the adapters by these names

PEFT 0.21 takes the layer number for the adapter of that name when it saves: layer 0 is then missing from its own file, and lies in the
folder "0" beside it as `layers.weight`, from where it is read here. A file that has all layers, such as one written here, PEFT loads.
It renames the keys of the adapters inside as if every model's layers were called model.layers, so GPT-2's cannot be written for it.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.expert import expert
from lorakit.adapters.folder import locate
from lorakit.adapters.peft_fields import COMMON, FOLLOWED, number, positive, switch
from lorakit.adapters.peft_type import FolderType, Table, argument
from lorakit.adapters.weights import floats, pack, unpack
from lorakit.core.adapter import Adapter
from lorakit.core.delta import stack
from lorakit.core.errors import AdapterMismatch, CheckpointError, NotExportable
from lorakit.core.method import get_method
from lorakit.core.site import ROOT, sites_of

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "adapter.json"
LAYERS = "base_model.internal_xlora_classifier.layers."
GATE = f"{ROOT}.gate."
OWN: dict[str, Any] = {
    "adapters": {}, "enable_softmax": True, "enable_softmax_topk": False, "global_scaling_weight": 1.0, "hidden_size": 4096,
    "layerwise_scalings": False, "scaling_pass_value": 0.0, "softmax_temperature": 1.0, "top_k_lora": None, "use_trainable_adapters": False,
    "xlora_depth": 1, "xlora_dropout_p": 0.2, "xlora_size": 2048,
}  # fmt: skip
ARGUMENTS = {
    "enable_softmax": "softmax", "enable_softmax_topk": "softmax_top_k", "global_scaling_weight": "weight",
    "layerwise_scalings": "layerwise", "scaling_pass_value": "pass_scale", "softmax_temperature": "temperature", "top_k_lora": "top_k",
    "use_trainable_adapters": "train_adapters", "xlora_depth": "depth", "xlora_dropout_p": "gate_dropout", "xlora_size": "size",
}  # fmt: skip
"""Field -> our argument."""


def _folders(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())


class XLora(FolderType):
    """Ranks and sites are those of the adapters inside."""

    table = Table(
        name="XLORA",
        config={**COMMON, **OWN, "peft_type": "XLORA"},
        followed=FOLLOWED | OWN.keys(),
        keys={},
        native={},
        fits={
            "adapters": _folders,
            "top_k_lora": lambda value: value is None or positive(value),
            **dict.fromkeys(("hidden_size", "xlora_depth", "xlora_size"), positive),
            **dict.fromkeys(("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters"), switch),
            **dict.fromkeys(("global_scaling_weight", "scaling_pass_value", "softmax_temperature", "xlora_dropout_p"), number),
        },
    )

    def write(self, adapter: Adapter, folder: Path, fields: Mapping[str, Any], one: Callable[[Adapter, Path], object]) -> dict[str, bytes]:
        strange = [site.name for site in adapter.sites if not site.name.startswith("model.")]
        if strange:
            raise NotExportable(
                f"PEFT's X-LoRA loads adapters of layers under 'model' alone, and {strange[0]!r} is not; write its adapters apart"
            )
        said = {field: argument(adapter, name) for field, name in ARGUMENTS.items()}
        if said["layerwise_scalings"] and any(site.rows is not None for site in adapter.sites):
            raise NotExportable("PEFT has one gate for a fused weight, and this adapter has one for each of its parts (layerwise)")
        gate = adapter.shared("gate")
        n = len(next(delta.experts() for delta in adapter.deltas().values()))
        for i in range(n):
            one(expert(adapter, i), folder / str(i))
        said |= {
            "adapters": {str(i): str((folder / str(i)).resolve()) for i in range(n)},
            "hidden_size": gate["W1"].shape[1],
            "use_trainable_adapters": said["use_trainable_adapters"] or not argument(adapter, "adapters"),
        }
        places = _places(said)
        layers = {f"{LAYERS}{places[int(k[1:]) - 1]}.{'weight' if k[0] == 'W' else 'bias'}": v for k, v in gate.items()}
        config = {**self.table.config, **fields, **said}
        return {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), WEIGHTS: pack(floats(layers))}

    def read(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, model: nn.Module, one: Callable[[Path], Adapter]
    ) -> Adapter:
        names = list(config["adapters"])
        if names != [str(i) for i in range(len(names))] or not names:
            raise NotExportable(f"{path}: the adapters are called {names}; PEFT itself activates none but '0', '1', '2', … in this order")
        inside = [one(_found(path.parent, name, config["adapters"][name])) for name in names]
        factors = [adapter.factors() for adapter in inside]
        here = {name for found in factors for name in found}
        sites = tuple(site for site in sites_of(model) if site.name in here)
        out: dict[str, Tensor] = {}
        for site in sites:
            stacked = stack([found.get(site.name) for found in factors], site.d_out, site.d_in)
            out |= {f"{site.name}.{k}": v for k, v in zip(("A", "B", "scales"), stacked, strict=True)}
        kwargs = {name: config[field] for field, name in ARGUMENTS.items()}
        recipe = get_method("xlora", adapters=tuple(config["adapters"].values()), **kwargs).recipe
        assert recipe is not None
        kept = {k: v for k, v in config.items() if k in COMMON and k != "inference_mode"}
        return Adapter(recipe, sites, out | _gate(config, tensors, path), {"peft": {"peft_type": "XLORA", **kept}})


def _places(config: Mapping[str, Any]) -> list[int]:
    """Where each linear layer stands among the classifier's modules."""
    step = 3 if config["xlora_dropout_p"] > 0 else 2
    return [step * i for i in range(config["xlora_depth"])]


def _gate(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for i, place in enumerate(_places(config), 1):
        for ours, theirs in (("W", "weight"), ("c", "bias")):
            out[f"{GATE}{ours}{i}"] = _layer(tensors, place, theirs, path).to(torch.float32)
    extra = [key for key in tensors if not re.fullmatch(re.escape(LAYERS) + r"\d+\.(weight|bias)", key)]
    if extra or len(tensors) > len(out):
        raise AdapterMismatch(f"{path.parent} holds tensors that are not the gate's: {sorted(extra or tensors)[0]}, …")
    return out


def _layer(tensors: Mapping[str, Tensor], place: int, name: str, path: Path) -> Tensor:
    key = f"{LAYERS}{place}.{name}"
    if key in tensors:
        return tensors[key]
    beside = locate(path.parent / str(place), WEIGHTS)
    lost = {} if beside is None else unpack(beside.read_bytes(), beside)
    if LAYERS + name not in lost:
        raise AdapterMismatch(
            f"{path.parent} lacks {key}: PEFT leaves it out when it saves, and the folder {str(place)!r} that PEFT writes beside has it; "
            "copy that folder as well"
        )
    return lost[LAYERS + name]


def _found(folder: Path, name: str, said: str) -> Path:
    """Where an adapter is: where the configuration says, or beside it."""
    for path in (Path(said), folder / said, folder / name, folder / Path(said).name):
        if any(locate(path, file) is not None for file in (CONFIG, RECORD)) and path.resolve() != folder.resolve():
            return path
    raise CheckpointError(f"{folder} needs the adapter {name!r} in {said}, and there is none, nor one in {folder / name}")
