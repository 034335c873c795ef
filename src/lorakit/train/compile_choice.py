"""Whether a run compiles its layers (train/compile.py): as configured, or by an estimate that is printed.

    eager = operations / (rate · threads)      saved = share · eager      cost = start + graph · graphs      on: saved > MARGIN · cost

It is a question of counts and fixed figures, never of a clock: compiled and eager results differ by rounding, and the same configuration
should give the same bits on the same machine. A checkpoint holds the choice.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from lorakit.core.attach import Adapted
from lorakit.core.errors import Incompatible
from lorakit.core.site import select
from lorakit.train.compile import layers_of
from lorakit.train.config import TrainConfig
from lorakit.train.dataset import TrainData
from lorakit.train.distributed import World
from lorakit.train.sequence import ends_of


class Figures(NamedTuple):
    """What was measured on one kind of device, in round numbers."""

    rate: float
    """Operations a second and thread that an eager step reaches in its layers' products, everything else of the step included."""
    share: float
    """The part of an eager step that compiling saves."""
    start: float
    """Seconds before the first graph."""
    graph: float
    """Seconds a graph."""


FIGURES = {("cpu", "bfloat16"): Figures(250e9, 0.18, 6.0, 18.0), ("cpu", "float32"): Figures(90e9, 0.04, 6.0, 18.0)}
MARGIN = 2.0
"""Compiling must save so many times what it costs: machines differ."""


@dataclass(frozen=True)
class Choice:
    """Whether a run compiles its layers, and why."""

    on: bool
    why: str = ""
    required: bool = False
    """A layer that cannot be compiled is an error."""
    dynamic: bool | None = None
    """True: one graph for all lengths (see `compile_layers`)."""


@dataclass(frozen=True)
class Estimate:
    """Seconds, from counts: the eager run, what compiling saves of it, and what compiling takes."""

    eager: float
    saved: float
    cost: float

    @classmethod
    def of(cls, figures: Figures, *, flops: float, threads: int, graphs: int) -> Self:
        """The estimate of a run of so many operations, all processes' threads alike."""
        eager = flops / (figures.rate * threads)
        return cls(eager, figures.share * eager, figures.start + figures.graph * graphs)

    @property
    def pays(self) -> bool:
        """Whether it is worth it."""
        return self.saved > MARGIN * self.cost

    def __str__(self) -> str:
        return f"about {self.eager:.0f} s of eager steps, of which it saves {self.saved:.0f} s for {self.cost:.0f} s of compiling"


def choose(config: TrainConfig, adapted: Adapted, data: TrainData, here: World, before: bool | None = None) -> Choice:
    """What the run chose `before`, if it is resumed; else what the configuration says; for "auto", what an estimate says.

    Raises Incompatible when it is wanted and there is no compiler, or the base is sharded.
    """
    dynamic = True if any(task.train.fill is None for task in data.tasks) else None
    if before is False or config.torch_compile is False:
        return Choice(False)
    if here.sharded and (before or config.torch_compile is True):
        raise Incompatible("torch_compile is not supported over a sharded base; use torch_compile=false")
    if before or config.torch_compile is True:
        if (missing := no_compiler(here.device)) is not None:
            raise Incompatible(f"torch_compile needs {missing} on this machine; install one, or use torch_compile=false")
        return Choice(True, required=config.torch_compile is True, dynamic=dynamic)
    if (reason := unfit(config, adapted, data, here)) is not None:
        return Choice(False, f"no, since {reason}")
    estimate = estimate_of(config, adapted, data, here)
    if not estimate.pays:
        return Choice(False, f"no, {estimate}")
    if (missing := no_compiler(here.device)) is not None:
        return Choice(False, f"no, since it needs {missing}: {estimate}")
    return Choice(True, f"yes, {estimate}")


def estimate_of(config: TrainConfig, adapted: Adapted, data: TrainData, here: World) -> Estimate:
    """The estimate of this process's whole run."""
    figures, flops = FIGURES[here.device.type, config.dtype], flops_of(config, adapted, data, here)
    return Estimate.of(figures, flops=flops, threads=torch.get_num_threads(), graphs=graphs_of(adapted))


def unfit(config: TrainConfig, adapted: Adapted, data: TrainData, here: World) -> str | None:
    """Why a run is not compiled unless it is asked for."""
    reasons = {
        f"nothing was measured in {config.dtype} on {here.device.type}": (here.device.type, config.dtype) not in FIGURES,
        "the base is sharded": here.sharded,
        "batches are padded to varying lengths": any(task.train.fill is None for task in data.tasks),
        f"{type(adapted.model).__name__} has no repeated layers": not layers_of(adapted.model),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def flops_of(config: TrainConfig, adapted: Adapted, data: TrainData, here: World) -> float:
    """Operations of this process's whole run in the layers' frozen products: forward, and backward to the inputs."""
    items = [len(task.train.items) for task in data.tasks]
    mine = config.per_device_train_batch_size * config.gradient_accumulation_steps
    tokens = ends_of(config, items, mine * here.size)[-1] * mine * config.max_length
    inside = tuple(id(m) for layer in layers_of(adapted.model) for m in layer.modules())
    sites = [s for s in select(adapted.model, "all-linear") if id(adapted.model.get_submodule(s.module)) in inside]
    passes = 3 if config.gradient_checkpointing else 2
    return 2.0 * passes * tokens * sum(s.d_in * s.d_out for s in sites)


def graphs_of(adapted: Adapted) -> int:
    """Graphs that a run compiles: of each kind of layer, and of the first one; of each layer, where a method treats every layer apart.

    As many again where some batches have a mask and others need none, which the margin must cover.
    """
    layers = layers_of(adapted.model)
    apart = any(adapted.methods[name].patches for name in adapted.active) or bool(adapted.cell.reads)
    kinds = {type(layer) for layer in layers}
    return len(layers) if apart else min(len(layers), len(kinds) + 1)


def no_compiler(device: torch.device) -> str | None:
    """What inductor lacks on this machine to make programs for a device; None if it has all."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++ or clang++)"
    return None if device.type == "cpu" or has_triton() else "Triton"
