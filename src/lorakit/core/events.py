"""What happens around a step besides the forward: inits before it, objectives and penalties in it, controllers after it, loops instead
of it.

Order in one ordinary step: before_forward, forward, loss, backward (a micro-batch at a time), penalties, after_backward (gradients
unclipped), clip, optimizer.step, after_step (gradients still alive; `clip` says by what they were multiplied), zero_grad.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, Factors
from lorakit.core.site import MIXTURES, Kind, Site

if TYPE_CHECKING:
    from lorakit.core.attach import Adapted
    from lorakit.core.calibrate import Calibration, Seen

MicroBatches = Sequence[Mapping[str, Any]]
"""What one optimizer step takes: the batches of its forwards."""


@dataclass(frozen=True)
class Task:
    """One of `count` tasks that a run trains on in sequence, from 0 on; an ordinary run has one."""

    index: int
    count: int


@dataclass(frozen=True)
class Step:
    """`index` counts optimizer steps from 0; `clip` is the factor that gradient clipping applied (1.0 when it did nothing)."""

    index: int
    total: int
    clip: float = 1.0


class Run(Protocol):
    """What controllers and loops may ask of the run that they are part of."""

    @property
    def adapted(self) -> "Adapted": ...
    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer as it is now: resuming and resizing may exchange it, so ask again."""

    def stream(self, lo: float = 0.0, hi: float = 1.0) -> Iterator[MicroBatches]:
        """The training data, endlessly, one step's micro-batches at a time, from the share [lo, hi) of a fixed shuffle of the items.
        Asked for before the first step, in a fixed order; its position is part of a checkpoint."""

    def gradients(self, batches: MicroBatches, info: Step) -> tuple[float, int]:
        """Add the gradients of the mean loss over these batches, and of the penalties; (summed nats, tokens)."""

    def loss(self, batches: MicroBatches, info: Step) -> tuple[float, int]:
        """(summed nats, tokens) of these batches without any graph, in the model's present mode."""

    def update(self, info: Step) -> None:
        """after_backward, clip, the step of the optimizer, after_step, zero_grad. The groups have this step's rate since before_forward."""

    def scored(self, batch: Mapping[str, Any]) -> "Scored":
        """One plain forward of a batch, with its graph."""

    @property
    def processes(self) -> int:
        """How many processes the run has."""

    def total_(self, tensor: Tensor) -> None:
        """Sum a statistic over all processes, in place: what follows from it must be the same everywhere."""

    def calibration(self, batches: int) -> "Calibration":
        """So many batches from the present task's training data (0: all of it), and the loss on them."""


class Controller:
    """Changes g, ranks, weights or data between steps. Override what is needed; the state must survive save and resume."""

    def start(self) -> None:
        """Before the first step of a run."""

    def before_task(self, task: Task) -> None:
        """Before a task's first step; `run.calibration` gives its data. The optimizer is fresh."""

    def after_task(self, task: Task) -> None:
        """After a task's last step, before the tasks seen so far are evaluated; `run.calibration` still gives its data."""

    def before_forward(self, step: Step) -> None:
        """Before the first micro-batch of a step."""

    def after_backward(self, step: Step) -> None:
        """All gradients of the step accumulated, not yet clipped."""

    def rate(self, step: Step) -> float:
        """A factor on this step's learning rate."""
        return 1.0

    def after_step(self, step: Step) -> None:
        """Weights updated; gradients still alive."""

    def finish(self) -> None:
        """After the last step: what the adapter is saved as."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave; the adapter's tensors are already back."""


class ControllerSpec(Protocol):
    """A value that builds a run's controller."""

    @property
    def requires(self) -> frozenset[str]: ...

    def build(self, run: Run) -> Controller: ...


class Loop(ABC):
    """One optimizer step from data to update."""

    @abstractmethod
    def step(self, info: Step) -> tuple[float, int]:
        """(summed nats, tokens) of the step's training data. before_forward has run; calls `run.update`, or does the update itself."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; the streams' positions are the run's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        return None


class LoopSpec(Protocol):
    """A value that builds a run's loop."""

    @property
    def requires(self) -> frozenset[str]: ...

    def build(self, run: Run) -> Loop: ...


class _Descent(Loop):
    def __init__(self, run: Run) -> None:
        self.run, self.data = run, run.stream()

    def step(self, info: Step) -> tuple[float, int]:
        done = self.run.gradients(next(self.data), info)
        self.run.update(info)
        return done


@dataclass(frozen=True)
class Descent:
    """The ordinary step: the gradient of one stream, then the update."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    requires: frozenset[str] = frozenset()

    def build(self, run: Run) -> Loop:
        return _Descent(run)


class Scored(NamedTuple):
    """One forward of a micro-batch: the loss summed over its targets, and their number."""

    loss: Tensor
    n: int
    outputs: Tensor
    """Logits, [.., classes]."""
    kept: Tensor | None
    """Which of them have a target, bool [..]; None: all."""

    @property
    def logits(self) -> Tensor:
        """Logits at the targets, [n, classes]."""
        return self.outputs.flatten(0, -2) if self.kept is None else self.outputs[self.kept]


class Objective(Protocol):
    """A value that makes the training loss of a micro-batch from one or several forwards of it; evaluation never sees it."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, score: Callable[[int], Scored], adapted: "Adapted") -> tuple[Tensor, int]:
        """(summed loss, targets). `score(i)` is the i-th forward, i = 0, 1, …, each with masks of its own."""


class Penalty(Protocol):
    """A value that adds a scalar to the training loss (never to the evaluation loss), once a step: a function of the parameters alone."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, adapted: "Adapted", ctx: Ctx) -> Tensor: ...


class Init(Protocol):
    """A value that sets a fresh delta's tensors. `requires` ⊆ what the delta provides; draws only from `rng`, on the CPU."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None: ...


class Calibrated(ABC):
    """An init that must see data first: what it `needs` is collected at every site, then `fit` gives the init proper."""

    requires: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    """⊆ {"inputs", "target_inputs", "gradients"}: the second moment of each site's inputs, at every token that is no padding or only at
    those with a label; the loss's gradient for its whole weight."""
    batches: int
    """How many batches of the training data it asks for."""

    @abstractmethod
    def fit(self, seen: Mapping[str, "Seen"], sites: Sequence[Site]) -> Init:
        """The init that follows from what was seen, by site name. It may call `delta.fit` to change a site's rank."""


class Assembled(ABC):
    """An init made of finished adapters: attach reads them, in either format, and adapts the sites that any of them adapts."""

    requires: frozenset[str] = frozenset()
    folders: tuple[str, ...]

    @abstractmethod
    def fit(self, found: Sequence[Mapping[str, Factors]]) -> Init:
        """The init that follows from each adapter's factors, by site name. It may call `delta.fit` to change a site's rank."""
