"""What there is to say about a method, as text: its paper, its code, its resolved parts. `lorakit show` and the docs print the same."""

import dataclasses
import inspect
import re
from typing import Any

from lorakit.core.method import COMMON, Entry, Method, describe

USE = "Use it when "
"""What a method's module says at its end, in one paragraph: when to take it, and when not."""


def parameters(entry: Entry) -> str:
    """`r=8 alpha=16.0 …`: what the method's function takes, with the defaults."""
    return " ".join(f"{name}={spelled(p.default, quote=False)}" for name, p in entry.parameters.items())


def members(entry: Entry) -> list[Entry]:
    """The registered methods of a composition `a+b`, in order; any other is its own only one."""
    return [describe(name) for name in entry.name.split("+")] if "+" in entry.name else [entry]


def paper(entry: Entry) -> str:
    """The module's docstring: equations with shapes, what is trained, defaults, references, and when to use it."""
    return "\n\n".join(inspect.getdoc(inspect.getmodule(one.make)) or "" for one in members(entry))


def use(entry: Entry) -> str:
    """The paragraph that says when to use it, on one line; empty where a plugin's method says nothing."""
    found = re.search(rf"^{USE}.*?(?=\n\n|\Z)", paper(entry), flags=re.MULTILINE | re.DOTALL)
    return " ".join(found[0].split()) if found else ""


def equations(entry: Entry) -> tuple[str, str]:
    """(the first line, what follows) of the module's docstring, without the paragraph that says when to use it."""
    title, _, body = paper(entry).partition("\n")
    return title, re.sub(rf"^{USE}.*?(?=\n\n|\Z)", "", body, flags=re.MULTILINE | re.DOTALL).strip("\n")


def meaning(entry: Entry, name: str) -> str:
    """What a parameter is: its common meaning, or the first sentence of the module's docstring that names it, prose before equations."""
    if name in COMMON:
        return COMMON[name]
    blocks = re.split(r"\n\s*\n", "\n\n".join(equations(one)[1] for one in members(entry)))
    blocks.sort(key=lambda block: block.startswith("    "))
    sentences = [s for block in blocks for s in re.split(r"(?<=[.;])\s+(?=[^a-z\s]|`)", " ".join(block.split()))]
    sentences.sort(key=lambda sentence: sentence.startswith("Default"))
    marked = (f"`{name}[`=]", rf"(?<![\w.`]){re.escape(name)}(?![\w.`])")
    return next((s for mark in marked for s in sentences if re.search(mark, s)), "")


def code(entry: Entry) -> str:
    """Source of the registered function, decorator included."""
    return "\n\n\n".join(inspect.getsource(one.make).rstrip() for one in members(entry))


def parts(method: Method) -> dict[str, Any]:
    """The parts that a method has: empty ones and the recipe are left out; tuples of parts are numbered."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            found |= {f"{field.name}[{i}]": v for i, v in enumerate(value)}
        elif field.name != "recipe" and value not in (None, ()):
            found[field.name] = value
    return found


def spelled(value: Any, *, quote: bool = True) -> str:
    """A value as one would type it; a part without the capabilities it `requires`, which are no choice of the user's."""
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.name != "requires"]
        return f"{type(value).__name__}({', '.join(f'{name}={spelled(getattr(value, name))}' for name in fields)})"
    return value if isinstance(value, str) and not quote else repr(value)


def source_line(thing: Any) -> str:
    """`lorakit/methods/learning/dora.py:92`, where a function or class is defined."""
    return f"{inspect.getmodule(thing).__name__.replace('.', '/')}.py:{inspect.getsourcelines(thing)[1]}"  # type: ignore[union-attr]
