"""The same adapter in a smaller file: without what can be drawn again, and without what nothing but further training reads.

vera       the projections, which follow from their key
vb_lora    of all logits the choice they make; what is left cannot be trained
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lorakit.core.adapter import POOL, Adapter
from lorakit.core.errors import NotExportable
from lorakit.core.method import Recipe
from lorakit.core.site import ROOT
from lorakit.ops import reference as ops


def compact(adapter: Adapter) -> Adapter:
    """Raises NotExportable for a method that has no smaller form."""
    if adapter.recipe.name not in COMPACT:
        raise NotExportable(f"{adapter.recipe.name} has no smaller form than its trained tensors; {' and '.join(COMPACT)} have one")
    return COMPACT[adapter.recipe.name](adapter)


def without_projections(adapter: Adapter) -> Adapter:
    """VeRA without its pair. Raises NotExportable when it is not the one that its key gives here."""
    smaller = _said(adapter, "save_projection", False)
    pool, _ = smaller.build()
    assert pool is not None
    for name, tensor in adapter.shared(POOL).items():
        if name in ("A", "B") and not torch.equal(tensor, pool.get_buffer(name)):
            raise NotExportable(f"the adapter's projection {name} is not the one that its key gives with this version of torch")
    vectors = {key: tensor for key, tensor in adapter.tensors.items() if not key.startswith(f"{ROOT}.{POOL}.")}
    return replace(smaller, tensors=vectors | {f"{ROOT}.{POOL}.{name}": tensor for name, tensor in pool.state_dict().items()})


def choices(adapter: Adapter) -> Adapter:
    """VB-LoRA with the chosen indices, and all but the last of their weights, in the place of logits."""
    smaller = _said(adapter, "compact", True)
    _, deltas = smaller.build("meta")
    blank = {f"{name}.{key}": tensor for name, delta in deltas.items() for key, tensor in delta.state_dict().items()}
    tensors = {}
    for key, tensor in adapter.tensors.items():
        place = key.removesuffix("_logits")
        if place == key:
            tensors[key] = tensor
        else:
            like = blank[f"{place}_indices"]
            weights, indices = ops.choose(tensor, like.shape[-1])
            tensors |= {f"{place}_indices": indices.to(like.dtype), f"{place}_weights": weights[..., :-1].contiguous()}
    return replace(smaller, tensors=tensors)


def _said(adapter: Adapter, name: str, value: bool) -> Adapter:
    """The adapter with an argument of its recipe changed."""
    return replace(adapter, recipe=Recipe(adapter.recipe.name, {**adapter.recipe.kwargs, name: value}))


COMPACT: Mapping[str, Callable[[Adapter], Adapter]] = {"vera": without_projections, "vb_lora": choices}
"""By recipe."""
