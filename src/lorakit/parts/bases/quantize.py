"""Quantize a model once, for all adapters that come after; the original weights are dropped, module by module."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lorakit.core.base import BaseSpec, hosts
from lorakit.core.errors import CheckpointError, Incompatible
from lorakit.core.layer import Slot
from lorakit.parts.bases.host import held
from lorakit.parts.bases.nf4_base import NF4, NF4Spec
from lorakit.parts.bases.packed import Layout


def quantize(model: nn.Module, spec: BaseSpec | None = None) -> nn.Module:
    """Store the model's linear weights as `spec` says (None: NF4 with double quantization) and return the model.

    Embeddings, heads and norms stay as they are. Adapters trained on the result remember its storage. `save_pretrained` writes NF4 in
    bitsandbytes' layout, which plain `from_pretrained` loads where bitsandbytes is installed. Raises Incompatible for an adapted model.
    """
    if any(isinstance(module, Slot) for module in model.modules()):
        raise Incompatible("this model is adapted; quantize it before the first adapter, or detach() them first")
    spec = spec or NF4Spec()
    for module in hosts(model, spec.sites):
        spec.store(module, keep=False)
    packed = {name: held(m).layout for name, m in model.named_modules() if getattr(type(m), "storage", None) is NF4}
    if packed:
        _remember(model, spec, packed)
    return model


def _remember(model: nn.Module, spec: BaseSpec, packed: Mapping[str, Layout]) -> None:
    """Say how the model is stored, to the adapters that will be trained on it and to Transformers."""
    layout = next(iter(packed.values()))
    facts = {"blocksize": layout.blocksize, "double_quant": layout.double_quant}
    dtype = str(layout.dtype).removeprefix("torch.")
    model.__dict__["quantized"] = {"nf4": facts | {"sites": spec.sites if isinstance(spec.sites, str) else list(packed)}, "dtype": dtype}
    config = getattr(model, "config", None)
    if config is not None:
        rest = [n for n, m in model.named_modules() if n not in packed and type(m).__name__ in ("Linear", "Conv1D")]
        config.quantization_config = for_bitsandbytes(layout, dtype, rest)


def for_bitsandbytes(layout: Layout, dtype: str, rest: list[str]) -> dict[str, Any]:
    """The `quantization_config` by which Transformers loads the model; `rest` are the linear modules that are not packed."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": layout.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": rest,
    }


def stored_as(facts: Mapping[str, Any] | None) -> NF4Spec | None:
    """The spec by which to store a base again as an adapter remembers it; None for as it is. Raises CheckpointError."""
    if not facts:
        return None
    try:
        settings = dict(facts["nf4"])
        sites = settings.pop("sites")
        return NF4Spec(**settings, sites=sites if isinstance(sites, str) else tuple(sites))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the adapter says its base is stored as {facts}, which this lorakit does not know: {error}") from None
