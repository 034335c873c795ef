"""What happens around a step besides the forward: inits before it, penalties in it, controllers after it.

Order in one optimizer step: before_forward, forward, loss + penalties, backward, after_backward (gradients unclipped), clip,
optimizer.step, after_step (gradients still alive; `clip` says by what they were multiplied), zero_grad.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta
from lorakit.core.site import Site

if TYPE_CHECKING:
    from lorakit.core.attach import Adapted


@dataclass(frozen=True)
class Step:
    """`index` counts optimizer steps from 0; `clip` is the factor that gradient clipping applied (1.0 when it did nothing)."""

    index: int
    total: int
    clip: float = 1.0


class Controller:
    """Changes g, ranks, weights or data between steps. Override what is needed; the state must survive save and resume."""

    def start(self) -> None:
        """Before the first step of a run."""

    def before_forward(self, step: Step) -> None:
        """Before the first micro-batch of a step."""

    def after_backward(self, step: Step) -> None:
        """All gradients of the step accumulated, not yet clipped."""

    def after_step(self, step: Step) -> None:
        """Weights updated; gradients still alive."""

    def finish(self) -> None:
        """After the last step: what the adapter is saved as."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""


class ControllerSpec(Protocol):
    """A value that builds a run's controller."""

    @property
    def requires(self) -> frozenset[str]: ...

    def build(self, adapted: "Adapted", total: int) -> Controller: ...


class Penalty(Protocol):
    """A value that adds a scalar to the training loss (never to the evaluation loss)."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, adapted: "Adapted", ctx: Ctx) -> Tensor: ...


class Init(Protocol):
    """A value that sets a fresh delta's tensors. `requires` ⊆ what the delta provides; draws only from `rng`, on the CPU."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None: ...
