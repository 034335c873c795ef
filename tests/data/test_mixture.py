"""Mixtures: how many rows of each source, always the same ones, alternating; and rows that are made when asked for."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.lazy import Chain, Chosen
from lorakit.data.mixture import mixed


def source(name, n):
    return [{"text": f"{name} {i}"} for i in range(n)]


A, B = source("a", 40), source("b", 10)


def counts(rows):
    return Counter(row["text"][0] for row in rows)


@pytest.mark.parametrize(
    ("weights", "strategy", "expected"),
    [
        ({"a": 1, "b": 1}, "passes", {"a": 40, "b": 10}),
        ({"a": 0.5, "b": 2.5}, "passes", {"a": 20, "b": 25}),
        ({"a": 1, "b": 1}, "under", {"a": 10, "b": 10}),
        ({"a": 1, "b": 1}, "over", {"a": 40, "b": 40}),
        ({"a": 0.8, "b": 0.2}, "under", {"a": 40, "b": 10}),
        ({"a": 3, "b": 1}, "under", {"a": 30, "b": 10}),
        ({"a": 3, "b": 1}, "over", {"a": 40, "b": 13}),
    ],
)
def test_rows_of_an_epoch(weights, strategy, expected):
    rows, lines = mixed({"a": A, "b": B}, weights, strategy)
    assert counts(rows) == expected
    total = sum(expected.values())
    assert lines == tuple(
        f"{name}: {n} rows x {weights[name]:g} -> {expected[name]} rows, {100 * expected[name] / total:.1f} % of an epoch"
        for name, n in (("a", 40), ("b", 10))
    )


def test_a_part_is_always_the_same_rows_wherever_they_stand():
    half = {row["text"] for row in mixed({"a": A}, {"a": 0.5}, "passes")[0]}
    assert len(half) == 20
    assert {row["text"] for row in mixed({"a": A[::-1], "b": B}, {"a": 0.5, "b": 1}, "passes")[0]} - {row["text"] for row in B} == half
    twice = Counter(row["text"] for row in mixed({"a": A}, {"a": 1.5}, "passes")[0])
    assert {text for text, n in twice.items() if n == 2} == half
    assert len(twice) == 40


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.1, 3), st.floats(0.1, 3), st.sampled_from(["passes", "under", "over"]))
def test_sources_alternate_each_in_its_own_order(m, n, v, w, strategy):
    try:
        rows, _ = mixed({"a": source("a", m), "b": source("b", n)}, {"a": v, "b": w}, strategy)
    except DataError as error:
        if "gives no row" not in str(error):
            raise
        return
    found, total = counts(rows), len(rows)
    for name, size in (("a", m), ("b", n)):
        numbers = [int(row["text"][2:]) for row in rows if row["text"][0] == name]
        passes = Counter(numbers)
        assert max(passes.values()) - min([passes[i] for i in range(size)]) <= 1
        assert numbers[:size] == sorted(numbers[:size])
        for at in range(total):
            assert abs(sum(row["text"][0] == name for row in rows[:at]) - at * found[name] / total) <= 2


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(DataError, match="the weight of b is .*; expected a positive number, or leave the source out"):
        mixed({"a": A, "b": B}, {"a": 1, "b": weight}, "passes")


def test_a_source_that_gives_nothing_is_refused():
    with pytest.raises(DataError, match=r"b gives no row: 10 rows with weight 0\.01 \(passes\)"):
        mixed({"a": A, "b": B}, {"a": 1, "b": 0.01}, "passes")


def test_lazy_rows_are_a_sequence_like_the_list_of_them():
    rows, whole = Chain([A, B]), [*A, *B]
    assert rows == whole
    assert rows != whole[1:]
    assert [rows[i] for i in (0, 39, 40, -1)] == [whole[i] for i in (0, 39, 40, -1)]
    assert list(reversed(rows[3:44:5])) == whole[3:44:5][::-1]
    part = rows[5:][::-2]
    assert part == whole[5:][::-2]
    assert isinstance(part, Chosen)
    assert part.rows is rows, "a slice of a slice is one step from the rows"
    assert pickle.loads(pickle.dumps(part)) == part
    with pytest.raises(IndexError):
        rows[50]
    assert Chosen(A, np.array([1, 1])) == [A[1], A[1]]
