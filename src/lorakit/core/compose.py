"""Several methods at once: `pissa+loraplus`, `qlora+dora`. The first named leads; each later one brings the parts that are its own.

A part is a method's own when it is not the neutral one: the default of its field in Method or in the delta's spec, or an init that declares
itself `neutral`. Two different ones of a part cannot be had at once, and the error says which; penalties, controllers, patches and what is
trained whole add up.
Parameters are the union of both signatures, with the first one's defaults, and each goes to all methods that know it. A name that only
looks the same (no common one, and the defaults differ) stays at each method's own default and cannot be given.
A gate has one owner: a controller or a loop.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.core.errors import BadParameter, Incompatible

if TYPE_CHECKING:
    from lorakit.core.method import Entry, Method

ADDED = ("penalties", "controllers", "patches", "unfreeze")


def composed(entries: Sequence["Entry"], common: Collection[str]) -> Callable[..., "Method"]:
    """A function with the joined signature that makes the joined method. `common`: names that mean the same in every method."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for entry in reversed(entries):
        hints |= typing.get_type_hints(entry.make)
    for entry in entries:
        parameters = entry.parameters | parameters
    apart = {k for e in entries for k, p in e.parameters.items() if k not in common and p.default != parameters[k].default}

    def make(**kwargs: Any) -> "Method":
        for k in sorted(apart & kwargs.keys()):
            both = " and ".join(entry.name for entry in entries if k in entry.parameters)
            raise BadParameter(f"{both} each have a parameter {k!r} of their own; together they keep their defaults, so leave it out")
        whole = {name: parameter.default for name, parameter in parameters.items() if name not in apart} | kwargs
        made = [entry.make(**{k: whole[k] for k in entry.parameters if k in whole}) for entry in entries]
        first, *rest = made
        for entry, other in zip(entries[1:], rest, strict=True):
            first = _joined(first, other, entry.name)
        return first

    make.__doc__ = " With ".join(entry.summary for entry in entries)
    make.__annotations__ = hints
    make.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return make


def _joined(first: "Method", other: "Method", name: str) -> "Method":
    """The first method with the other's own parts."""
    neutral = {f.name: f.default for f in dataclasses.fields(first)}
    parts = {f: _sum(getattr(first, f), getattr(other, f)) for f in ADDED}
    parts |= {f: _one(getattr(first, f), getattr(other, f), neutral[f], f, name) for f in ("combine", "optim", "base", "objective", "loop")}
    parts["init"] = _init(first.init, other.init, name)
    parts["delta"] = _fields(first.delta, other.delta, name)
    owners = [_kind(part) for part in (*parts["controllers"], parts["loop"]) if "gate" in part.requires]
    if len(owners) > 1:
        raise Incompatible(f"{' and '.join(owners)} each set the gate g of every site; only one can (in {name}, and before it)")
    return first.but(**parts, identity=first.identity and other.identity)


def _sum(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> tuple[Any, ...]:
    return mine + tuple(part for part in theirs if part not in mine)


def _one(mine: Any, theirs: Any, neutral: Any, what: str, name: str) -> Any:
    """The one that is not neutral."""
    if theirs in (mine, neutral):
        return mine
    if mine == neutral:
        return theirs
    raise Incompatible(f"two methods bring their own {what} ({_kind(mine)}, and {name}'s {_kind(theirs)}); only one can act")


def _init(mine: Any, theirs: Any, name: str) -> Any:
    """The one that does not declare itself neutral."""
    if theirs is None or getattr(theirs, "neutral", False):
        return mine
    return _one(None if getattr(mine, "neutral", False) else mine, theirs, None, "start", name)


def _fields(mine: Any, theirs: Any, name: str) -> Any:
    """One frozen value from two of a kind, field by field; fields without a default are the first one's."""
    if mine is None or theirs is None:  # a method without deltas
        return mine or theirs
    if type(mine) is not type(theirs):
        if _plain(theirs):
            return mine
        raise Incompatible(f"{name} has another kind of update ({_kind(theirs)}) than the methods before it ({_kind(mine)})")
    changes = {}
    for f in dataclasses.fields(mine):
        a, b = getattr(mine, f.name), getattr(theirs, f.name)
        if dataclasses.is_dataclass(a):
            changes[f.name] = _fields(a, b, name)
        elif f.default is not dataclasses.MISSING:
            changes[f.name] = _one(a, b, f.default, f.name, name)
    return dataclasses.replace(mine, **changes)


def _plain(spec: Any) -> bool:
    """Whether nothing but fields without a default was chosen, here and in what it holds."""
    values = [(f, getattr(spec, f.name)) for f in dataclasses.fields(spec)]
    return all(_plain(v) if dataclasses.is_dataclass(v) else f.default in (dataclasses.MISSING, v) for f, v in values)


def _kind(part: Any) -> str:
    return repr(part) if isinstance(part, str | int | float | tuple) else type(part).__name__
