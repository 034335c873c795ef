"""What a search for weights comes to: the mixed adapter, the weights, and everything that was tried."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.adapters.mix.mix import Weight, mix
from lorakit.core.adapter import Adapter
from lorakit.core.errors import DataError
from lorakit.train.weights.weighed import Rows, Space, Together


@dataclass(frozen=True)
class Tried:
    """One evaluation: the weights of each place, the loss, and the score that was to be small (the loss and what is added to it)."""

    weights: Rows
    loss: float
    score: float


@dataclass(frozen=True)
class Found:
    """The adapters mixed with the best of the weights that were tried."""

    adapter: Adapter
    """A plain LoRA; its meta says under "search" how its weights were found."""
    weights: list[Weight]
    """One an adapter, as `mix` takes them."""
    loss: float
    """On the examples, with these weights."""
    base: float | None
    """The same of the model without adapters; None where that was not among what was tried."""
    tried: tuple[Tried, ...]
    """In order."""


@dataclass(frozen=True)
class Unmixed:
    """The best weights, before the adapters are mixed with them: what is left when they are off the model again."""

    weights: list[Weight]
    best: Tried
    tried: tuple[Tried, ...]


def best_of(here: Together, tried: Sequence[Tried]) -> Unmixed:
    """The first of the best. Raises DataError where no loss was a number."""
    best = min(tried, key=lambda one: one.score if math.isfinite(one.score) else math.inf)
    if not math.isfinite(best.score):
        raise DataError(f"none of {len(tried)} evaluations gave a finite loss: look at the examples and at the adapters")
    return Unmixed(here.for_mix(best.weights), best, tuple(tried))


def mixed(
    adapters: Sequence[Adapter], found: Unmixed, *, how: str, space: Space, base: float | None, force: bool, settings: Mapping[str, Any]
) -> Found:
    """The adapters with these weights, in the space that they were found in."""
    adapter = mix(adapters, weights=found.weights, space=space, force=force)
    record = {"how": how, "loss": found.best.loss, "base_loss": base, "evaluations": len(found.tried), "settings": dict(settings)}
    adapter = replace(adapter, meta={**adapter.meta, "search": record})
    return Found(adapter, found.weights, found.best.loss, base, found.tried)
