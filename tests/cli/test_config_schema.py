"""`lorakit config-schema`, as typed."""

import json

from tests.cli.typed import run


def test_the_schema_is_json() -> None:
    schema = json.loads(run("config-schema", "--method", "lora"))
    assert schema["properties"]["r"]["default"] == 8 and "lora_rank" in schema["properties"]
    assert json.loads(run("config-schema", "--field", "lora_r", "--method", "pissa"))["default"] == 8


def test_a_key_by_another_tools_name() -> None:
    output = run("config-schema", "--field", "cutoff_len")
    assert "cutoff_len is max_length here" in output and "axolotl: sequence_len" in output
    assert "Did you mean 'max_length'" in run("config-schema", "--field", "max_lenght", code=2)


def test_a_table_to_read() -> None:
    output = run("config-schema", "--format", "table", "--method", "lora")
    assert "sequence_len" in output and "rank of the update" in output
