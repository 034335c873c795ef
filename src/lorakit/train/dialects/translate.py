"""From keys as they were written to ours: whose they are, what they mean here, and what is to be said of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.core.errors import BadParameter
from lorakit.train.dialects.axolotl import AXOLOTL
from lorakit.train.dialects.llama_factory import LLAMA_FACTORY
from lorakit.train.dialects.rule import Dialect, Draft
from lorakit.train.dialects.trl import TRL

DIALECTS = (LLAMA_FACTORY, AXOLOTL, TRL)


@dataclass(frozen=True)
class Translated:
    """Our keys and values, and lines for the user."""

    values: dict[str, Any]
    """What was given, ours first."""
    defaults: dict[str, Any]
    """What the dialect does where nothing was said."""
    notes: tuple[str, ...]


def translate(file: Mapping[str, Any], flags: Mapping[str, Any], ours: Iterable[str]) -> Translated:
    """A file's keys overridden by flags, each in our names or a dialect's; `ours`: all names that are ours.

    A file with a dialect's marks is that tool's file and has its defaults. Otherwise foreign names are aliases of single keys. Raises
    BadParameter for a key that is nobody's only later (make_config), for one of another dialect here.
    """
    names = frozenset(ours)
    dialect = recognize(file if file else flags, names)
    if dialect is not None:
        return _whole(dialect, file, flags, names)
    return _aliases(file, flags, names)


def recognize(keys: Iterable[str], ours: frozenset[str] = frozenset()) -> Dialect | None:
    """The dialect whose marks are among the keys. Raises BadParameter for those of two."""
    given = set(keys) - ours
    marks = {dialect.name: given & dialect.marks for dialect in DIALECTS}
    if "datasets" in given and "model_name_or_path" in given:  # TRL's mixture of data sets has the same name as axolotl's
        marks[AXOLOTL.name] -= {"datasets"}
    found = [dialect for dialect in DIALECTS if marks[dialect.name]]
    if len(found) > 1:
        one, two = found[:2]
        raise BadParameter(
            f"{min(marks[one.name])!r} is {one.title}'s and {min(marks[two.name])!r} is {two.title}'s; write a configuration in one "
            "tool's keys, or in lorakit's (lorakit config-schema lists them with their other names)"
        )
    return found[0] if found else None


def _whole(dialect: Dialect, file: Mapping[str, Any], flags: Mapping[str, Any], ours: frozenset[str]) -> Translated:
    for where in (file, flags):
        for key in where:
            if key not in dialect.keys and key not in ours and (other := owners(key)):
                raise BadParameter(
                    f"{key!r} is {other[0].title}'s key in a configuration of {dialect.title}; use {near(key, dialect) or 'its own name'}"
                )
    theirs = {k: v for k, v in file.items() if k in dialect.keys}
    typed = {k: v for k, v in flags.items() if k in dialect.keys}
    own_file = {k: v for k, v in file.items() if k not in dialect.keys}
    own_flags = {k: v for k, v in flags.items() if k not in dialect.keys}
    draft = Draft(dialect, theirs | typed, own_file | own_flags, whole=True)
    draft.read()
    own_file = _settled(draft, own_file, typed)
    marks = sorted((set(file) | set(flags)) & dialect.marks)
    head = f"a configuration of {dialect.title}, by {', '.join(marks)}"
    return Translated(draft.values | own_file | own_flags, draft.left_out, (head, *draft.says()))


def _settled(draft: Draft, own_file: dict[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of the file, but those that a flag in other words replaces. The same thing said twice in one file is an error."""
    kept = dict(own_file)
    for key, source in draft.sources.items():
        if key in kept and kept[key] != draft.values[key]:
            if source not in typed:
                raise BadParameter(f"{source} is {key} here, and both are given; keep one")
            del kept[key]
    return kept


def _aliases(file: Mapping[str, Any], flags: Mapping[str, Any], ours: frozenset[str]) -> Translated:
    own_file = {k: v for k, v in file.items() if k in ours or not owners(k)}
    own_flags = {k: v for k, v in flags.items() if k in ours or not owners(k)}
    foreign = {k: v for k, v in {**file, **flags}.items() if k not in ours and owners(k)}
    values: dict[str, Any] = {}
    notes: list[str] = []
    while foreign:
        dialect = max(DIALECTS, key=lambda d: sum(k in d.keys for k in foreign))
        mine = {k: foreign.pop(k) for k in list(foreign) if k in dialect.keys}
        draft = Draft(dialect, mine, own_file | own_flags, whole=False)
        draft.read()
        own_file = _settled(draft, own_file, flags)
        values |= draft.values
        notes += [f"{line}, as {dialect.title} calls it" if " -> " in line else line for line in draft.says()]
    return Translated(values | own_file | own_flags, {}, tuple(notes))


def owners(key: str) -> list[Dialect]:
    """The dialects that have a key."""
    return [dialect for dialect in DIALECTS if key in dialect.keys]


def near(key: str, dialect: Dialect) -> str:
    """A dialect's name for what another's key means."""
    for other in owners(key):
        rule = other.keys[key]
        for ours in getattr(rule, "ours", "").split():
            if names := dialect.aliases(ours):
                return repr(names[0])
            return repr(ours)
    return ""


def aliases_of(ours: str) -> dict[str, list[str]]:
    """Every dialect's names for a key of ours: {title: names}."""
    named = {dialect.title: dialect.aliases(ours) for dialect in DIALECTS}
    return {title: names for title, names in named.items() if names}
