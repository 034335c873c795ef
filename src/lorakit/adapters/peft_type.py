"""One of PEFT's types of adapter (LORA, VERA, …): its configuration, the keys of its tensors, and both directions.

A type is one file in peft_types/ and one entry in its table. What the types have in common (files, lists of modules, modules trained whole,
lorakit.json) is done once, in peft_read and peft_write.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from lorakit.adapters.peft_experts import Targets
from lorakit.adapters.peft_fields import Fits
from lorakit.core.adapter import Adapter
from lorakit.core.method import Method, describe
from lorakit.core.scale import Rank
from lorakit.core.site import Kind, Site


class Held(Protocol):
    """What a folder holds for one module."""

    @property
    def kind(self) -> Kind: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By the short names of the type's keys."""


H = TypeVar("H", bound=Held)


@dataclass(frozen=True)
class Part:
    """One module's tensors as they are in the file."""

    kind: Kind
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Found(Generic[H]):
    """What a folder holds."""

    config: dict[str, Any]
    path: Path
    """The configuration's."""
    modules: dict[str, H]
    shared: dict[str, Tensor]
    """What the modules share, by the short names of the type's keys."""
    saved: dict[str, Tensor]
    """Parameters trained as a whole, by path."""
    base: dict[str, Tensor]
    """Weights of adapted embeddings as PEFT saw them, by module."""


@dataclass(frozen=True)
class Form(Generic[H]):
    """An adapter as one of PEFT's types holds it. `rank`: how ranks and scales are best said. `restorable`: whether the tensors alone give
    the adapter back."""

    modules: Mapping[str, H]
    rank: Rank | None = None
    peft_type: str = "LORA"
    fields: dict[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    restorable: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of each site's change of the weight; empty where the form is exact."""
    total: float = 0.0


Writer = Callable[[Adapter, nn.Module | None], Form[Any] | None]
"""The form of an adapter, or None when the type cannot hold this one."""


@dataclass(frozen=True)
class Table:
    """What a type has: fields, keys, and which methods are its own."""

    name: str
    """`peft_type` in the configuration."""
    config: Mapping[str, Any]
    """Every field and its default."""
    followed: frozenset[str]
    """Fields whose values are read, or cannot change what a trained adapter computes."""
    keys: Mapping[Kind, Mapping[str, str]]
    """Short name of a module's tensor -> end of its key, by kind of module."""
    native: Mapping[str, Writer]
    """The methods whose own type this is, by recipe."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Short name of a tensor that the modules share -> its key after "base_model."."""
    fits: Mapping[str, Fits] = field(default_factory=dict)
    """Whether a value is one that PEFT writes, for the fields of this type."""
    patterns: tuple[str, ...] = ()
    """Fields of this type that hold regular expressions."""
    bias: str | None = None
    """The word in the field `bias` for the biases of adapted modules alone; None where the type trains no biases."""
    dropout: str | None = None
    """The field that holds the probability of our `dropout`."""
    identity: bool = True
    """Whether PEFT starts a module at no change, so that one without tensors in the file does no harm."""


class PeftType(ABC, Generic[H]):
    """Both directions of a type."""

    table: ClassVar[Table]

    def refuse(self, config: Mapping[str, Any], path: Path) -> None:
        """Raise NotExportable for what the table of followed fields cannot say."""
        return None

    def said(self, form: Form[H], carried: Mapping[str, Any]) -> dict[str, Any]:
        """What a form says in the type's fields, beside `form.fields`; where possible in the words that its configuration once used."""
        return {}

    def opened(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], targets: Targets, path: Path) -> Mapping[str, Tensor]:
        """A file's tensors, those of parameters that PEFT wraps under the parameters' own paths."""
        return tensors

    def placed(self, form: Form[H], *, old: Collection[str] = ()) -> dict[str, tuple[Kind, Mapping[str, Tensor]]]:
        """Where the file has each module's tensors, as it has them: by path. `old`: stacks in PEFT's layout before 0.19."""
        return {name: (held.kind, held.tensors) for name, held in form.modules.items()}

    @abstractmethod
    def module(self, name: str, part: Part, config: Mapping[str, Any], path: Path) -> H:
        """What one module's tensors are. Raises AdapterMismatch when they do not fit each other or the configuration."""

    @abstractmethod
    def closest(self, found: Found[H], sites: Sequence[Site]) -> tuple[str, dict[str, Any], Mapping[str, H]]:
        """The closest recipe's name and arguments (those of every method aside), and the modules as it needs them."""

    @abstractmethod
    def tensors(self, found: Found[H], method: Method, sites: Sequence[Site], model: nn.Module | None) -> dict[str, Tensor]:
        """The adapter's tensors, keyed as in Adapter, those trained as a whole aside."""


class FolderType(ABC):
    """A type whose folder holds other adapters beside tensors of its own."""

    table: ClassVar[Table]

    @abstractmethod
    def write(self, adapter: Adapter, folder: Path, fields: Mapping[str, Any], one: Callable[[Adapter, Path], object]) -> dict[str, bytes]:
        """Write the adapters inside with `one`, and give the bytes of the files beside them. `fields`: those of every configuration."""

    @abstractmethod
    def read(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path, model: nn.Module, one: Callable[[Path], Adapter]
    ) -> Adapter:
        """The adapter, those inside being read with `one`. `path`: the configuration's."""


def argument(adapter: Adapter, name: str) -> Any:
    """An argument of the adapter's recipe, or the method's default."""
    return adapter.recipe.kwargs.get(name, describe(adapter.recipe.name).parameters[name].default)


def whole_linear(adapter: Adapter) -> bool:
    """Whether every site is a whole linear weight, all that most types know."""
    return all(site.kind == "linear" and site.rows is None for site in adapter.sites)
