"""L17: every parameter of a recipe is typed, has a default, is documented, and is a flag of the command line."""

import inspect
import json
import re
import typing

import pytest

from lorakit import describe, get_method, list_methods
from lorakit.cli.flags import parse_flags
from lorakit.core.method import COMMON, Entry
from lorakit.train.config import FIELDS, make_config


def documentation(entry: Entry) -> str:
    """What `lorakit show` prints: the module's docstring and the function's."""
    return (inspect.getdoc(inspect.getmodule(entry.make)) or "") + "\n" + (inspect.getdoc(entry.make) or "")


def check_L17(name: str) -> None:
    entry = describe(name)
    hints = typing.get_type_hints(entry.make)
    assert entry.paper
    assert entry.survey
    assert entry.summary.endswith(".")
    assert entry.paper in documentation(entry), "the references name the paper"
    for key, parameter in entry.parameters.items():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is not inspect.Parameter.empty, f"{key} has no default"
        assert key in hints, f"{key} has no type"
        assert key in COMMON or re.search(rf"\b{key}\b", documentation(entry)), f"{key} is explained neither in COMMON nor in the docstring"
        assert key not in FIELDS, f"{key} is also a key of the training configuration"
    words = [w for k, p in entry.parameters.items() for w in (f"--{k.replace('_', '-')}", json.dumps(p.default))]
    config = make_config({"method": name, **parse_flags(words)})
    assert config.method_args.keys() == entry.parameters.keys()
    assert config.build_method() == get_method(name), "a default fails its own check"


@pytest.mark.parametrize("name", list_methods())
def test_L17(name: str) -> None:
    check_L17(name)
