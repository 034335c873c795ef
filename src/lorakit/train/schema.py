"""The configuration as a JSON Schema: keys with defaults, ranges and meanings, the methods' own parameters, and other tools' names.

A key of another tool stands beside ours with `x-means`, so that an editor completes and checks their files too.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic

from lorakit.core.errors import BadParameter
from lorakit.core.method import COMMON, describe, list_methods
from lorakit.train.config import FIELDS, PRESET, TrainConfig, nearest_key
from lorakit.train.dialects.rule import Idle, Joint, Only, Rule, To
from lorakit.train.dialects.translate import DIALECTS, aliases_of


@dataclass(frozen=True)
class Key:
    """One key: what it holds, what it is if left out, what it means, and what other tools call it."""

    name: str
    kind: str
    default: Any
    about: str
    aliases: Mapping[str, list[str]]
    method: str | None = None
    """The method whose parameter it is; None for a key of every run."""


def config_schema(method: str | None = None) -> dict[str, Any]:
    """JSON Schema of a configuration file; with `method`, of runs of that method alone. Raises NoSuchMethod."""
    whole = TrainConfig.model_json_schema()
    properties: dict[str, Any] = {name: whole["properties"][name] for name in FIELDS}
    properties["preset"] = {"type": ["string", "null"], "default": None, "description": PRESET}
    for name in [method] if method else list_methods():
        for key, found in parameters(name).items():
            properties.setdefault(key, found)
    if method:
        properties["method"] = properties["method"] | {"default": method}
    for dialect in DIALECTS:
        for key, rule in dialect.keys.items():
            said = f"{dialect.title}: {means(rule)}"
            if key not in properties:
                properties[key] = {"description": said, "x-means": getattr(rule, "ours", "").split()}
            elif "x-means" in properties[key]:
                properties[key]["description"] += f"; {said}"
            elif "anyOf" not in properties[key] or {"description": said} not in properties[key]["anyOf"]:
                properties[key] = _either(properties[key], said)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorakit train" + (f": {method}" if method else ""),
        "description": "Keys of a configuration file of lorakit train, each also a flag.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _either(own: dict[str, Any], said: str) -> dict[str, Any]:
    """A key of ours that another tool has too, with values of its own."""
    if own.get("x-shared"):
        return own | {"anyOf": [*own["anyOf"], {"description": said}]}
    kept = {name: own[name] for name in ("description", "default", "title") if name in own}
    return kept | {"anyOf": [{k: v for k, v in own.items() if k not in kept}, {"description": said}], "x-shared": True}


def means(rule: Rule) -> str:
    """What a foreign key is here, in a few words."""
    if isinstance(rule, To):
        return f"{rule.ours} by another name"
    if isinstance(rule, Idle):
        return f"without effect, since {rule.why}"
    if isinstance(rule, Only):
        return f"{' or '.join(map(repr, rule.values)) or 'left out'} only; else {rule.instead}"
    return f"decides {rule.ours.replace(' ', ', ')}" if isinstance(rule, Joint) and rule.ours else "read with others"


def parameters(method: str) -> dict[str, Any]:
    """JSON Schema of a method's own parameters."""
    entry = describe(method)
    hints = typing.get_type_hints(entry.make)
    found = {}
    for name, parameter in entry.parameters.items():
        try:
            kind = pydantic.TypeAdapter(hints[name]).json_schema()
        except pydantic.errors.PydanticInvalidForJsonSchema:  # sites may be a function, which no file holds
            kind = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
        default = parameter.default
        kind.setdefault("default", list(default) if isinstance(default, tuple) else default)
        found[name] = kind | {"description": f"{method}: {COMMON.get(name, 'see lorakit show ' + method)}"}
    return found


def keys_of(method: str | None = None) -> list[Key]:
    """Every key of a configuration, then those of one method, or of all."""
    whole = TrainConfig.model_json_schema()["properties"]
    keys = [
        Key(name, kind_of(whole[name]), whole[name].get("default"), whole[name].get("description", ""), aliases_of(name)) for name in FIELDS
    ]
    keys.append(Key("preset", "string", None, PRESET, {}))
    for name in [method] if method else list_methods():
        for key, found in parameters(name).items():
            about = found["description"].partition(": ")[2]
            keys.append(Key(key, kind_of(found), found["default"], about, aliases_of(key), name))
    return keys


def key_named(name: str, method: str | None = None) -> Key:
    """A key by its name here or in another tool; without `method`, a parameter is that of the first method that has it, lora before others.

    Raises BadParameter naming the nearest.
    """
    keys = keys_of(method)
    for wanted in (name, *(ours for d in DIALECTS if name in d.keys for ours in getattr(d.keys[name], "ours", "").split())):
        found = sorted((key for key in keys if key.name == wanted), key=lambda key: key.method not in (None, "lora"))
        if found:
            return found[0]
    idle = [f"{d.title}'s {name} is {means(d.keys[name])}" for d in DIALECTS if name in d.keys]
    if idle:
        raise BadParameter(f"{name!r} is no key of lorakit's; {'; '.join(idle)}")
    raise BadParameter(f"unknown key {name!r}. {nearest_key(name, {key.name: None for key in keys})}")


def kind_of(found: Mapping[str, Any]) -> str:
    """A schema's type and range in a few words."""
    if "enum" in found:
        return " | ".join(map(str, found["enum"]))
    if "const" in found:
        return str(found["const"])
    if "anyOf" in found:
        return " | ".join(dict.fromkeys(kind_of(one) for one in found["anyOf"]))
    kind = str(found.get("type", "any"))
    kind = {"integer": "int", "number": "float", "boolean": "true | false", "object": "mapping", "array": "list"}.get(kind, kind)
    words = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    ranges = [f"{sign} {found[bound]:g}" for bound, sign in words if bound in found]
    return f"{kind} {' and '.join(ranges)}" if ranges else kind
