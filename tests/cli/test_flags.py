"""Flags are read as a configuration file's values are."""

import pytest

from lorakit.cli.flags import parse_flags
from lorakit.core.errors import BadParameter


def test_values_are_those_of_a_file() -> None:
    words = ["r=8", "--alpha", "1e-4", "--sites", "[q, v]", "--run-at", "2024-01-01", "--no-packing"]
    assert parse_flags(words) == {"alpha": 1e-4, "sites": ["q", "v"], "run_at": "2024-01-01", "packing": False, "r": 8}
    with pytest.raises(BadParameter, match="--sites .* cannot be read"):
        parse_flags(["--sites", "[q"])


def test_values_without_brackets_are_told_them() -> None:
    with pytest.raises(BadParameter, match=r"unexpected argument 'k_proj'; .* several values as --key '\[a, b\]'"):
        parse_flags(["--sites", "q_proj", "k_proj"])


def test_a_list_of_texts_is_one_where_several_may_be_given() -> None:
    names = {"strings": frozenset({"train_data"}), "several": frozenset({"train_data"})}
    assert parse_flags(["--train-data", "[a.jsonl, b.jsonl]"], **names) == {"train_data": ["a.jsonl", "b.jsonl"]}
    assert parse_flags(["--train-data", "{a.jsonl: 1}"], **names) == {"train_data": {"a.jsonl": 1}}
    assert parse_flags(["--train-data", "[draft] a.jsonl"], **names) == {"train_data": "[draft] a.jsonl"}
