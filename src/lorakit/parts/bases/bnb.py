"""A packed weight as bitsandbytes writes it into a state dict, both ways and bit for bit.

weight                                   uint8 [⌈n / 2⌉, 1]
weight.absmax                            fp32 [b], or uint8 [b] under double quantization
weight.quant_map                         fp32 [16], the levels
weight.nested_absmax, .nested_quant_map  fp32 [⌈b / 256⌉], fp32 [256]: under double quantization only
weight.quant_state.bitsandbytes__nf4     uint8, the bytes of a JSON object with the shape, the dtype and the offset
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.core.errors import CheckpointError
from lorakit.parts.bases.nf4 import LEVELS
from lorakit.parts.bases.packed import Layout, Packed
from lorakit.parts.bases.scales import BLOCK, MAP

STATE = "weight.quant_state.bitsandbytes__nf4"


def write(packed: Packed, layout: Layout) -> dict[str, Tensor]:
    """The entries of one weight."""
    device = packed.codes.device
    facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": layout.blocksize, "dtype": str(layout.dtype).removeprefix("torch.")}
    facts["shape"] = [layout.d_out, layout.d_in]
    found = {"weight": packed.codes, "weight.absmax": packed.scales, "weight.quant_map": torch.tensor(LEVELS, device=device)}
    if packed.nested is not None:
        found |= {"weight.nested_absmax": packed.nested[:-1].clone(), "weight.nested_quant_map": torch.tensor(MAP, device=device)}
        facts |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": packed.nested[-1].item()}
    return found | {STATE: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device=device)}


def read(entries: Mapping[str, Tensor], name: str) -> tuple[Packed, Layout]:
    """The weight that such entries hold; `name` is for messages. Raises CheckpointError for another format and for damage."""
    if STATE not in entries:
        raise CheckpointError(f"{name} is packed, but not as NF4: it has no {STATE}")
    facts = _facts(entries[STATE], name)
    _same(entries, "weight.quant_map", LEVELS, name)
    nested = None
    if "weight.nested_absmax" in entries:
        _same(entries, "weight.nested_quant_map", MAP, name)
        scales = entries["weight.nested_absmax"]
        nested = torch.cat([scales, scales.new_tensor([facts["nested_offset"]])])
    packed = Packed(entries["weight"].view(torch.uint8).reshape(-1, 1), entries["weight.absmax"], nested)
    d_out, d_in = facts["shape"]
    layout = Layout(d_out, d_in, getattr(torch, facts["dtype"]), facts["blocksize"], nested is not None)
    _fits(packed, layout, name)
    return packed, layout


def _facts(state: Tensor, name: str) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(bytes(state.cpu().tolist()))
        known = facts["quant_type"] == "nf4" and facts.get("nested_blocksize", BLOCK) == BLOCK and len(facts["shape"]) == 2
        known = known and isinstance(getattr(torch, facts["dtype"]), torch.dtype) and facts.get("nested_dtype", "float32") == "float32"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name}: its {STATE} cannot be read: {error!r}") from error
    if not known:
        raise CheckpointError(f"{name}: {facts} is not NF4 in blocks of scales of {BLOCK}")
    return facts


def _same(entries: Mapping[str, Tensor], key: str, values: tuple[float, ...], name: str) -> None:
    found = entries.get(key)
    if found is None or found.tolist() != list(values):
        raise CheckpointError(f"{name}: {key} is {'missing' if found is None else 'another table'}; only bitsandbytes' own can be read")


def _fits(packed: Packed, layout: Layout, name: str) -> None:
    want = {"weight": -(-layout.numel // 2), "weight.absmax": layout.blocks}
    found = {"weight": packed.codes.numel(), "weight.absmax": packed.scales.numel()}
    if packed.nested is not None:
        want["weight.nested_absmax"], found["weight.nested_absmax"] = -(-layout.blocks // BLOCK), packed.nested.numel() - 1
    for key, n in want.items():
        if found[key] != n:
            raise CheckpointError(f"{name}: {key} has {found[key]} entries; a {layout.d_out} × {layout.d_in} weight needs {n}")
