"""Adapters away from zero on tiny models, for the tests of mixing at inference."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach_adapter
from lorakit.data.tiny import tiny_model
from lorakit.train.source_model import load_model
from tests.laws.subject import attached, awaken, far, logits, small

IDS = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(5))
DIFFERENT: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 2, "alpha": 5.0}),
    ("rslora", {"r": 4, "alpha": 3.0, "sites": ["q_proj", "mlp"]}),
    ("vera", {"r": 4}),
    ("lora", {"r": 3, "sites": ["v_proj", "embedding"], "alpha": 1.0}),
]
"""Of several methods, ranks, scales and sites."""


def made(seed: int, name: str = "lora", *, arch: str = "llama", size: float = 0.3, **kwargs: Any) -> Adapter:
    """A finished adapter that changes a lot."""
    adapted = attached(tiny_model(arch), small(name, **kwargs), seed=seed)
    return awaken(adapted, seed=seed, size=size).state()


def several() -> dict[str, Adapter]:
    return {f"a{i}": made(i, name, **kwargs) for i, (name, kwargs) in enumerate(DIFFERENT)}


def equals(n: int = 3, **kwargs: Any) -> dict[str, Adapter]:
    """LoRAs of one rank at the same sites, of different scales."""
    return {f"a{i}": made(i, r=2, **{"alpha": 1.0 + i, **kwargs}) for i in range(n)}


def alone(adapter: Adapter, ids: Tensor = IDS, *, arch: str = "llama") -> Tensor:
    """Logits of a tiny model with this one adapter."""
    return logits(attach_adapter(tiny_model(arch), adapter).model, ids)


def saved(
    folder: Path, base: str, seed: int, name: str = "lora", *, size: float = 0.3, meta: dict[str, Any] | None = None, **kwargs: Any
) -> Path:
    """A folder with an adapter for the model in the folder `base`, which it names."""
    adapted = awaken(attached(load_model(base), small(name, **kwargs), seed=seed), seed=seed, size=size)
    adapted.meta = {"model": base, **(meta or {})}
    return adapted.save(folder)


__all__ = ["DIFFERENT", "IDS", "alone", "equals", "far", "logits", "made", "saved", "several", "tiny_model"]
