"""Rotary positions squeezed into the range that the base was trained on (position interpolation).

    θ_i ← θ_i / c        c = ⌈context / max_position_embeddings⌉

The same as Transformers' rope_type "linear" with the factor c.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.core.context import Cell
from lorakit.core.errors import Incompatible
from lorakit.core.shared import Patch
from lorakit.core.site import MIXTURES, Kind, Site


class Interpolated(Patch):
    """In force in training and inference alike; the config says the longer context meanwhile."""

    def __init__(self, model: nn.Module, context: int) -> None:
        super().__init__()
        config: Any = model.config
        self.model_of, self.context = (model,), context  # in a tuple: not a child
        self.factor = -(-context // config.max_position_embeddings)
        self.paths = [name for name, module in model.named_modules() if "inv_freq" in module._buffers]
        kinds = {getattr(model.get_submodule(path), "rope_type", None) for path in self.paths}
        if kinds != {"default"}:
            raise Incompatible(
                f"a longer context needs plain rotary positions (rope_type 'default'); this model has {sorted(map(str, kinds)) or 'none'}"
            )

    def install(self) -> None:
        config: Any = self.model_of[0].config
        self.short, config.max_position_embeddings = config.max_position_embeddings, max(self.context, config.max_position_embeddings)
        for i, path in enumerate(self.paths):
            module = self.model_of[0].get_submodule(path)
            self.register_buffer(f"original_{i}", module._buffers["inv_freq"], persistent=False)  # moves with the model
            module._buffers["inv_freq"] = getattr(self, f"original_{i}") / self.factor

    def remove(self) -> None:
        config: Any = self.model_of[0].config
        config.max_position_embeddings = self.short
        for i, path in enumerate(self.paths):
            self.model_of[0].get_submodule(path)._buffers["inv_freq"] = getattr(self, f"original_{i}")
            delattr(self, f"original_{i}")


@dataclass(frozen=True)
class InterpolatedSpec:
    """For texts of `context` tokens."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    context: int
    name: str = "interpolated"
    requires: frozenset[str] = frozenset()
    kept: str = "its rotary positions are interpolated, which no weight can hold"

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Interpolated:
        return Interpolated(model, self.context)

    def count(self, model: nn.Module) -> int:
        return 0
