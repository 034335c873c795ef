"""The ways to find weights by name. A function's keyword arguments are its options; they are checked before anything is attached.

(model, adapters, objective, *, options) -> Found
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec

import pydantic

from lorakit.core.checked import expected
from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.train.weights.found import Found

P = ParamSpec("P")


@dataclass(frozen=True)
class Finder:
    """A registered way."""

    name: str
    find: Callable[..., Found]
    paper: str

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults."""
        found = inspect.signature(self.find).parameters.values()
        return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.find) or "").split("\n")[0]


FINDERS: dict[str, Finder] = {}


def finder(name: str, *, paper: str) -> Callable[[Callable[P, Found]], Callable[P, Found]]:
    """Register a way to find weights; the function comes back with its options checked."""

    def register(find: Callable[P, Found]) -> Callable[P, Found]:
        hints = typing.get_type_hints(find, include_extras=True)

        @functools.wraps(find)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Found:
            return find(*args, **_checked(name, FINDERS[name].options, hints, kwargs))

        FINDERS[name] = Finder(name, checked, paper)
        return checked

    return register


def get_finder(name: str) -> Finder:
    """The way of this name. Raises BadParameter."""
    if name not in FINDERS:
        raise BadParameter(f"no way to find weights is called {name!r}. {did_you_mean(name, FINDERS)}")
    return FINDERS[name]


def _checked(name: str, known: Mapping[str, Any], hints: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    for key in options:
        if key not in known:
            raise BadParameter(f"{name} has no option {key!r}. {did_you_mean(key, known)}".rstrip())
    return {key: _value(f"{name}: {key}", hints[key], value) for key, value in options.items()}


def _value(what: str, hint: Any, value: Any) -> Any:
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise BadParameter(f"{what}={value!r}: expected {expected(error.errors()[0])}") from None
