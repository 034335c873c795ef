"""Presets: what suits a family of models, put under what the user says.

A preset is a file of keys, each with its reason behind it. `preset: NAME` takes it; `preset: auto` takes that of the model's type
(config.json). Its chat template is for tokenizers without one.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.train.config_file import read_mapping
from lorakit.train.model_facts import facts_of

FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """A family's keys; `text` is the file, with the reasons."""

    name: str
    about: str
    model_types: tuple[str, ...]
    values: Mapping[str, Any]
    text: str


@functools.cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    found = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        values = read_mapping(file)
        types = tuple(values.pop("for"))
        found[file.stem] = Preset(file.stem, text.partition("\n")[0].removeprefix("# "), types, values, text)
    return found


def preset(name: str) -> Preset:
    """One by name. Raises BadParameter naming the nearest."""
    if name not in presets():
        raise BadParameter(f"no preset is called {name!r}. {did_you_mean(name, presets())} lorakit presets lists them, auto chooses one")
    return presets()[name]


def preset_of(model: str) -> Preset:
    """That of a model's type. Raises BadParameter where there is none."""
    kind = "bundled" if model == "bundled" else facts_of(model).model_type
    for found in presets().values():
        if kind in found.model_types:
            return found
    raise BadParameter(f"no preset is for models of type {kind}; leave preset out, or name one of {', '.join(presets())}")


def under(name: Any, values: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The preset's keys that `values` leaves open, and a line that says them; `known`: the method's parameters. Raises BadParameter."""
    if not isinstance(name, str):
        raise BadParameter(f"preset={name!r} is no name; lorakit presets lists them, auto chooses one")
    model = str(values.get("model", "bundled"))
    found = preset_of(model) if name == "auto" else preset(name)
    open_ = {
        k: v for k, v in found.values.items() if k not in values and (k != "sites" or (k in known and values.get("init_adapter") is None))
    }
    if "chat_template" in open_ and facts_of(model).chat_template:
        del open_["chat_template"]
    said = ", ".join(f"{k} {v}" for k, v in open_.items())
    return open_, [f"preset {found.name}: {said or 'every key of it is given'}"]
