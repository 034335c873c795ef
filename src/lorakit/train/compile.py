"""`torch.compile`, layer by layer: the repeated layers of a model share their graphs, so that it pays in seconds; the rest stays eager.

A layer is compiled where it trains: in training mode and with gradients. Evaluation and generation run it eagerly, whatever their lengths.
One graph serves all layers of a kind, but the first one's input needs no gradient, which makes two. In backward whatever is cheap is
computed again (norms, rotary embeddings, activations, casts), and only what products and attention made is kept.
"""

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lorakit.core.errors import Incompatible

Backend = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]
"""Makes a graph runnable."""

SETTLED = 3
"""Steps after which every kind of batch should have come."""


class CompiledLayers:
    """The compiled layers of one model; `undo` leaves the model as it was.

    A layer that cannot be compiled is an error when `required`; otherwise all of them run eagerly from there on, and `failed` says why.
    """

    graphs = 0
    """How many were compiled so far."""
    seconds = 0.0
    """What that took, tracing aside."""
    failed: str | None = None

    def __init__(self, layers: Sequence[nn.Module], *, required: bool, dynamic: bool | None = None, backend: Backend | None = None) -> None:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        self.layers, self.required, self.backend = layers, required, backend or inductor
        self.errors = (TorchDynamoException, FailOnRecompileLimitHit)
        self.steps = self.early = 0
        self.compiled = torch.compile(  # type: ignore[call-overload]  # of which not every argument is in its stubs
            nn.Module._call_impl,
            backend=self._count,
            fullgraph=True,
            dynamic=dynamic,
            recompile_limit=4 * len(layers) + 4,  # at the worst every layer is of a kind of its own, with a mask and without, …
            isolate_recompiles=True,  # … and no other model's graphs count
        )
        for layer in layers:
            layer._compiled_call_impl = functools.partial(self._call, layer)

    def undo(self) -> None:
        """Every layer runs eagerly again."""
        for layer in self.layers:
            layer.__dict__.pop("_compiled_call_impl", None)

    def stepped(self) -> None:
        """A training step is done: after the first ones nothing should be left to compile."""
        self.steps += 1
        if self.steps <= SETTLED:
            self.early = self.graphs

    @property
    def notes(self) -> list[str]:
        """What did not go as it should."""
        late = self.graphs - self.early
        notes = [] if self.failed is None else [f"torch_compile: the layers ran eagerly, since one cannot be compiled: {self.failed}"]
        if late:
            notes.append(
                f"torch_compile: {late} of {self.graphs} graphs were compiled after the first {SETTLED} steps: batches vary in form"
            )
        return notes

    def _call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.failed or not (layer.training and torch.is_grad_enabled()):
            return layer._call_impl(*args, **kwargs)
        if not getattr(layer, "gradient_checkpointing", False):
            return self._run(layer, *args, **kwargs)
        # The checkpoint stays outside of the graph: its context is restored by Python (core/prepare.py).
        return layer._gradient_checkpointing_func(functools.partial(self._inside, layer, **kwargs), *args)  # type: ignore[operator]

    def _inside(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            return self._run(layer, *args, **kwargs)
        finally:
            layer.gradient_checkpointing = True  # type: ignore[assignment]

    def _run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():  # torch asks a layer's input whether it has a gradient, and warns of it
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                return self.compiled(layer, *args, **kwargs)
        except self.errors as error:
            inner = getattr(error, "inner_exception", error)  # a failed backend's own
            why = f"{type(layer).__name__}: {type(inner).__name__}: {str(inner).strip().splitlines()[0]}"
            if self.required:
                raise Incompatible(f"torch_compile=true cannot compile {why}; use torch_compile=false") from error
            self.failed = why
            return layer._call_impl(*args, **kwargs)

    def _count(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        began = time.perf_counter()
        made = self.backend(graph, inputs)
        self.graphs, self.seconds = self.graphs + 1, self.seconds + time.perf_counter() - began
        return made


def compile_layers(
    model: nn.Module, *, required: bool = True, dynamic: bool | None = None, backend: Backend | None = None
) -> CompiledLayers:
    """Compile the repeated layers of a model, in place.

    Args:
        model: a Transformers model, adapted or not.
        required: whether a layer that cannot be compiled is an error; otherwise all run eagerly.
        dynamic: as `torch.compile` has it; True where the length differs from batch to batch.
        backend: makes a graph runnable; None for `inductor`.

    Raises Incompatible when the model has no repeated layers.
    """
    layers = layers_of(model)
    if not layers:
        raise Incompatible(f"{type(model).__name__} has no repeated layers that Transformers marks as such; use torch_compile=false")
    return CompiledLayers(layers, required=required, dynamic=dynamic, backend=backend)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The outermost members of the model's lists of layers: those that gradient checkpointing wraps, or that must not be split."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    unsplit = frozenset(getattr(model, "_no_split_modules", None) or ())
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        whole = isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in unsplit
        if whole and path.rpartition(".")[2].isdigit() and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return list(found.values())


def inductor(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Inductor, with a backward pass that computes everything again but products, attention and row sums."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx
    from torch.utils.checkpoint import CheckpointPolicy

    for node in graph.graph.nodes:
        if _is_dear(node.target):  # torch would compute it again, too
            node.meta |= {"recompute": CheckpointPolicy.MUST_SAVE, "ac_graph_id": 0}
    with config.patch(aggressive_recomputation=True):
        return compile_fx(graph, inputs)  # type: ignore[return-value]


def inductor_rounding(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Inductor, rounding to bf16 wherever the layer itself does: then two graphs of one layer agree in what they have in common, as a
    layer's with and without a silent adapter must (train/preference.py), however each is fused."""
    from torch._inductor import config

    with config.patch(emulate_precision_casts=True):
        return inductor(graph, inputs)


def _is_dear(target: Any) -> bool:
    """Whether a node of a graph is attention or an operation of lorakit's: all of them are products, but for a mask."""
    if target is torch.nn.functional.scaled_dot_product_attention:
        return True
    return getattr(target, "namespace", None) == "lorakit" and target is not torch.ops.lorakit.keep_mask.default
