"""A model folder whose linear weights are packed in bitsandbytes' NF4 layout, read without bitsandbytes to the same codes.

The weights are decoded for Transformers to load as it loads any, and the codes put back in their places.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.core.errors import BadParameter, CheckpointError
from lorakit.core.site import weight_shape
from lorakit.parts.bases import bnb
from lorakit.parts.bases.host import held, put
from lorakit.parts.bases.matmul import nf4_dense
from lorakit.parts.bases.nf4_base import NF4Spec
from lorakit.parts.bases.packed import Layout, Packed
from lorakit.parts.bases.quantize import quantize


def is_packed(config: Any) -> bool:
    """Whether a model's configuration says that bitsandbytes packed its weights to four bits."""
    found = getattr(config, "quantization_config", None) or {}
    return isinstance(found, dict) and found.get("quant_method") == "bitsandbytes" and bool(found.get("load_in_4bit"))


def load_packed(auto: Any, folder: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model; `auto` is the Transformers class that makes it from its configuration. Raises BadParameter, CheckpointError."""
    if not Path(folder).is_dir():
        raise BadParameter(f"{folder} is packed by bitsandbytes, which is read from local folders only: download it, and give the folder")
    try:
        tensors = {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{folder} is damaged or cut off: {error}") from error
    packed = {name.removesuffix("." + bnb.STATE): _taken(tensors, name) for name in list(tensors) if name.endswith(bnb.STATE)}
    if not packed:
        raise CheckpointError(f"{folder} says that bitsandbytes packed its weights, and holds none packed as NF4")
    del config.quantization_config
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    for name, (weight, layout) in packed.items():
        W = nf4_dense(*weight, layout.d_out, layout.d_in, layout.dtype, layout.blocksize)
        here = skeleton.get_submodule(name)
        tensors[f"{name}.weight"] = W.T.contiguous() if weight_shape(here) != tuple(here.weight.shape) else W
    model: nn.Module = type(skeleton).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.config._name_or_path = folder  # type: ignore[union-attr]
    return _packed_again(model, packed)


def _taken(tensors: dict[str, Tensor], state: str) -> tuple[Packed, Layout]:
    """One weight's entries, taken out of the tensors of the file."""
    prefix = state.removesuffix(bnb.STATE)
    found = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix + "weight")}
    return bnb.read(found, prefix + "weight")


def _packed_again(model: nn.Module, packed: dict[str, tuple[Packed, Layout]]) -> nn.Module:
    _, layout = next(iter(packed.values()))
    quantize(model, NF4Spec(layout.double_quant, layout.blocksize, tuple(packed)))
    for name, (weight, at) in packed.items():
        module = model.get_submodule(name)
        put(module, weight)
        held(module).layout, held(module).origin = at, None  # nobody knows what it was packed from
    return model
