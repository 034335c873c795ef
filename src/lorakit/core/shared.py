"""What one adapter's sites share: a pool of tensors (VeRA's projections, a vector bank), and patches of the model around the sites.

Each is a child of one module at the model's root, `lora_shared.<adapter>.<child>`, so that it moves, casts and saves with the model; sites
hold unregistered references. In an Adapter their tensors are keyed `lora_shared.<child>.<tensor>`.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from lorakit.core.context import Cell
from lorakit.core.errors import AdapterMismatch
from lorakit.core.site import Site


class Shared(nn.Module):
    """Tensors that several sites use; `trains` says which of them learn."""

    trains: frozenset[str] = frozenset()
    draws: bool = False
    """Whether it draws masks in training."""

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        """Take the shapes of a saved adapter's tensors, before they are copied in. Raises AdapterMismatch where they cannot differ."""
        refuse_shapes(self, shapes)

    def roles(self) -> dict[str, str]:
        """{parameter name: role}."""
        return {name: name for name, _ in self.named_parameters(recurse=False)}


def refuse_shapes(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise AdapterMismatch unless the module's tensors have these shapes. What is missing or extra is judged elsewhere."""
    for name, tensor in module.state_dict().items():
        if name in shapes and tensor.shape != shapes[name]:
            found, needed = tuple(shapes[name]), tuple(tensor.shape)
            raise AdapterMismatch(f"tensor {name} has shape {found}; {type(module).__name__} here needs {needed}")


def take_shapes(fit: Callable[[Mapping[str, torch.Size]], None], shapes: Mapping[str, torch.Size], path: str) -> None:
    """`fit`, a part's own, with the part's path in its refusal."""
    try:
        fit(shapes)
    except AdapterMismatch as error:
        raise AdapterMismatch(f"{path}: {error}") from None
    except (IndexError, ValueError):  # a part reads the sides that its tensors must have
        found = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise AdapterMismatch(f"{path}: the tensors have the wrong number of dimensions: {found}") from None


class Patch(Shared):
    """A change of the model around W, in force while its adapter is active. It may own trained tensors."""

    @abstractmethod
    def install(self) -> None:
        """Put the patch in force. Called again only after `remove`."""

    @abstractmethod
    def remove(self) -> None:
        """Undo `install`, exactly."""


class PatchSpec(Protocol):
    """A value that builds an adapter's patch of a model."""

    @property
    def name(self) -> str:
        """Its name among the adapter's shared children."""

    @property
    def requires(self) -> frozenset[str]: ...
    @property
    def kept(self) -> str | None:
        """Why the patch is still needed at inference, when the weights are merged; None when it acts in training only."""

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Patch:
        """The patch, initialized and not installed. `sites`: those of the adapter. It must hold the model unregistered."""

    def count(self, model: nn.Module) -> int:
        """Trainable parameters, in closed form."""
