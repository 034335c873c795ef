"""A method is a frozen value: which parts, at which sites. A registered function makes it, and its signature is the configuration.

@method("lora", paper="arXiv:2106.09685", survey="2.1", kind="delta")
def lora(r: int = 8, alpha: float = 16.0, ...) -> Method: ...
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pydantic

from lorakit.core.base import BaseSpec
from lorakit.core.checked import expected
from lorakit.core.combine import AddSpec, CombineSpec
from lorakit.core.compose import composed
from lorakit.core.delta import DeltaSpec
from lorakit.core.errors import BadParameter, Incompatible, NoSuchMethod, did_you_mean
from lorakit.core.events import Assembled, Calibrated, ControllerSpec, Descent, Init, LoopSpec, Objective, Penalty
from lorakit.core.shared import PatchSpec
from lorakit.core.site import MODULES, Beyond, Site, Where
from lorakit.core.unfreeze import Pattern

COMMON = {
    "r": "rank of the update",
    "alpha": "numerator of the scale s (core/scale.py)",
    "dropout": "probability of dropping an entry of the delta's input in training",
    "sites": "preset (all-linear, linear-modules, attention, mlp, experts, router, qk, qv, kv, attention-output, mlp-output, embedding), "
    "name or suffix, glob, re:regex, or a list of those",
    "rank_pattern": "r at sites whose name ends in a match of the regex: {regex: r}",
    "alpha_pattern": "alpha at sites whose name ends in a match of the regex: {regex: alpha}",
    "unfreeze": "modules or parameters trained whole beside the deltas: name, suffix or glob",
}
"""What the parameters that methods share mean; a method's own are explained in its module's docstring."""


@dataclass(frozen=True)
class Recipe:
    """The name and arguments that rebuild a method."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """Parts, all of them frozen values with a `build`; everything built is owned by Adapted or by the run."""

    delta: DeltaSpec | None
    init: Init | Calibrated | Assembled | None = None
    combine: CombineSpec = AddSpec()
    sites: Where | Beyond = "all-linear"
    unfreeze: tuple[Pattern, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    controllers: tuple[ControllerSpec, ...] = ()
    optim: Any = None
    """An optimizer spec (parts/optimizers), or None for AdamW."""
    base: BaseSpec | None = None
    """How the frozen linear weights are stored, or None for as they are."""
    patches: tuple[PatchSpec, ...] = ()
    objective: Objective | None = None
    """How the training loss is made of forwards, or None for one forward's own loss."""
    loop: LoopSpec = Descent()
    identity: bool = True
    """Whether the output is unchanged at init up to rounding."""
    recipe: Recipe | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.sites, list):  # from a file or a flag; a value does not change
            object.__setattr__(self, "sites", tuple(self.sites))
        provided = self.delta.provides if self.delta else frozenset()
        parts = [self.init, self.combine, *self.penalties, *self.controllers, *self.patches, self.objective, self.loop]
        for part in parts:
            missing = (part.requires if part is not None else frozenset()) - provided
            if missing:
                delta = type(self.delta).__name__
                raise Incompatible(f"{type(part).__name__} needs a delta with {sorted(missing)}; {delta} provides {sorted(provided)}")

    def but(self, **parts: Any) -> "Method":
        """This method with some parts exchanged; checked again. The result has no recipe until a registered function returns it."""
        known = {f.name for f in dataclasses.fields(self)} - {"recipe"}
        for name in parts:
            if name not in known:
                raise BadParameter(f"Method has no part {name!r}. {did_you_mean(name, known)}")
        return dataclasses.replace(self, **parts, recipe=None)

    @property
    def beyond(self) -> str | None:
        """What the adapter is besides a change of weights: why it cannot be merged. None for most methods."""
        if self.delta is not None and self.delta.beyond is not None:
            return self.delta.beyond
        return next((patch.kept for patch in self.patches if patch.kept), None)

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BadParameter or Incompatible for what cannot be built at these sites."""
        self.check_kinds(sites)
        if self.delta is not None:
            self.delta.check(sites)

    def check_kinds(self, sites: Sequence[Site]) -> None:
        """Raise Incompatible for sites of a kind that some part was not made for."""
        parts = [self.delta, self.init, self.combine, self.optim, self.base, self.objective, self.loop]
        for part in [p for p in (*parts, *self.penalties, *self.controllers, *self.patches) if p is not None]:
            odd = [site for site in sites if site.kind not in getattr(part, "kinds", MODULES)]
            if odd:
                raise Incompatible(
                    f"{type(part).__name__} is made for plain layers and cannot adapt {len(odd)} weights of a mixture ({odd[0].kind}: "
                    f"{odd[0].name}, …); leave them frozen with sites='linear-modules', or choose a method that knows them"
                )

    def count(self, sites: list[Site]) -> int:
        """Trainable parameters of deltas, combines and what the sites share, in closed form; a patch knows its own (PatchSpec.count)."""
        if self.delta is None:
            return 0
        return self.delta.count_shared(sites) + sum(self.delta.count(s) + self.combine.count(s) for s in sites)


@dataclass(frozen=True)
class Entry:
    """One registered method: what `lorakit list` prints."""

    name: str
    make: Callable[..., Method]
    paper: str
    survey: str
    heading: str
    kind: str

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Signature of the method function: name -> parameter with annotation and default."""
        return dict(inspect.signature(self.make).parameters)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.make) or inspect.getdoc(inspect.getmodule(self.make)) or "").split("\n")[0]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        parameters = {n: p.default for n, p in self.parameters.items()}
        facts = {k: getattr(self, k) for k in ("name", "paper", "survey", "heading", "kind", "summary")}
        return facts | {"parameters": parameters}


_REGISTRY: dict[str, Entry] = {}


def method(name: str, *, paper: str, survey: str, kind: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a function as a method. Its module's folder is its heading."""

    def register(make: Callable[..., Method]) -> Callable[..., Method]:
        known = _REGISTRY.get(name)
        if known is not None and known.make.__module__ != make.__module__:
            raise BadParameter(f"method {name!r} is registered twice: in {known.make.__module__} and {make.__module__}")
        heading = make.__module__.split(".")[-2] if "." in make.__module__ else "external"
        _REGISTRY[name] = Entry(name, make, paper, survey, heading, kind)
        return make

    return register


@functools.cache
def _discover() -> None:
    package = importlib.import_module("lorakit.methods")
    for info in pkgutil.walk_packages(package.__path__, "lorakit.methods."):
        importlib.import_module(info.name)
    for point in importlib.metadata.entry_points(group="lorakit.methods"):
        point.load()


LARGEST = 2**32
"""Of any integer parameter: ranks, numbers of things, steps, seeds. A tensor of a larger side exists nowhere."""


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    _discover()
    return sorted(_REGISTRY)


def describe(name: str) -> Entry:
    """The registered entry, or for `a+b` that of both at once (core/compose.py). Raises NoSuchMethod naming the nearest."""
    _discover()
    if not isinstance(name, str):  # as a configuration or a record may say
        raise NoSuchMethod(f"a method has a name, not {name!r}; lorakit list shows them")
    if "+" in name:
        entries = [describe(part) for part in name.split("+")]
        papers = ", ".join(dict.fromkeys(entry.paper for entry in entries))
        return dataclasses.replace(entries[0], name=name, make=composed(entries, COMMON), paper=papers, kind="composition")
    if name not in _REGISTRY:
        raise NoSuchMethod(f"no method is called {name!r}. {did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def get_method(name: str, /, **kwargs: Any) -> Method:
    """The method with these parameters, checked against its signature.

    Raises NoSuchMethod, or BadParameter for an unknown name or a value of the wrong type (both with the nearest name or the type expected).
    """
    entry = describe(name)
    hints = typing.get_type_hints(entry.make)
    for key in kwargs:
        if key not in entry.parameters:
            raise BadParameter(f"method {name!r} has no parameter {key!r}. {did_you_mean(key, entry.parameters)}")
    checked = {k: _checked(name, k, hints[k], v) for k, v in kwargs.items()}
    return dataclasses.replace(entry.make(**checked), recipe=Recipe(name, checked))


def _checked(name: str, key: str, hint: Any, value: Any) -> Any:
    if callable(value):  # a predicate for sites
        return value
    if isinstance(value, str) and typing.get_origin(hint) is tuple:
        value = (value,)  # one name where several may stand
    if isinstance(value, int) and abs(value) > LARGEST:
        raise BadParameter(f"method {name!r}: {key}={value!r} is too large; expected at most {LARGEST}")
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise BadParameter(
            f"method {name!r}: {key}={value!r}: expected {' or '.join(dict.fromkeys(map(expected, error.errors())))}"
        ) from None
