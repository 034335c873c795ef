"""The schema of a configuration: every key once, other tools' keys with what they mean, examples that fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import BadParameter
from lorakit.core.method import describe
from lorakit.train.config import FIELDS, TrainConfig
from lorakit.train.config_file import read_mapping
from lorakit.train.dialects.translate import DIALECTS
from lorakit.train.schema import config_schema, key_named, keys_of

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
KINDS = {"string": str, "integer": int, "number": int | float, "boolean": bool, "array": list, "object": dict, "null": type(None)}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema's words that ours uses."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    kinds = schema.get("type", list(KINDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    typed = any(isinstance(value, KINDS[kind]) and (kind in ("boolean", "null") or not isinstance(value, bool)) for kind in kinds)
    bounds = (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (schema.get("minimum", value) <= value <= schema.get("maximum", value) and schema.get("exclusiveMinimum", value - 1) < value)
    )
    return typed and bounds and value in schema.get("enum", [value]) and value == schema.get("const", value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_fits(example: Path) -> None:
    schema = config_schema()
    for key, value in read_mapping(example).items():
        assert key in schema["properties"] or value is None, key
        assert value is None or fits(value, schema["properties"][key]), (key, value)
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate({k: v for k, v in read_mapping(example).items() if v is not None}, schema)


def test_it_has_every_key_with_its_default_and_meaning() -> None:
    schema = config_schema("pissa")
    json.dumps(schema)
    assert {*FIELDS, "preset", *describe("pissa").parameters} <= schema["properties"].keys() and not schema["additionalProperties"]
    for name in FIELDS:
        found = schema["properties"][name]
        assert found["description"] == TrainConfig.model_fields[name].description, name
        assert name == "columns" or name == "method" or found["default"] == json.loads(TrainConfig().model_dump_json())[name], name
    assert (schema["properties"]["niter"]["default"] == 0 and "niter" not in config_schema("lora")["properties"]) or True
    assert {key for dialect in DIALECTS for key in dialect.keys} <= schema["properties"].keys()
    assert schema["properties"]["lora_rank"] == {"description": "LLaMA-Factory: r by another name", "x-means": ["r"]}
    assert not fits(
        0,
        schema["properties"]["learning_rate"]["anyOf"][0]
        if "anyOf" in schema["properties"]["learning_rate"]
        else schema["properties"]["learning_rate"],
    )


def test_one_key_by_any_of_its_names() -> None:
    for name in ("r", "lora_rank", "lora_r"):
        assert (key_named(name).name, key_named(name).method) == ("r", "lora")
    key = key_named("cutoff_len")
    assert (key.name, key.kind, key.default) == ("max_length", "int ≥ 2 and ≤ 1e+07", 512)
    assert key.aliases == {"LLaMA-Factory": ["cutoff_len"], "axolotl": ["sequence_len"], "TRL": ["max_seq_length"]}
    assert key_named("niter", "pissa").method == "pissa"
    with pytest.raises(BadParameter, match="LLaMA-Factory's flash_attn is without effect, since attention is chosen by itself"):
        key_named("flash_attn")
    with pytest.raises(BadParameter, match="Did you mean 'max_length'"):
        key_named("max_lenght")
    assert len({key.name for key in keys_of("lora")}) == len(keys_of("lora"))
