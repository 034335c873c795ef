"""Laid-out charts: ticks that hold the data, lines that keep their spikes, points that lie where they belong."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.train.chart import LIMIT, Line, brief, chart, curve, finite, labels, thinned, ticks

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


@given(NUMBERS, NUMBERS)
def test_ticks_are_few_and_hold_the_range(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = ticks(low, high)
    span = max(high - low, 1e-9 * max(abs(low), abs(high)))
    assert 2 <= len(found) <= 8
    assert found[0] <= low + 1e-6 * span and found[-1] >= high - 1e-6 * span
    assert len(set(labels(found))) == len(found) or high - low < 1e-4 * max(abs(low), abs(high))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, ["0.0", "0.5", "1.0"]), (0, 2e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]), (0, 60000, ["0", "20k", "40k", "60k"])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[str]) -> None:
    assert labels(ticks(low, high)) == expected


def test_steps_are_whole_numbers() -> None:
    assert ticks(1, 3, 5, whole=True) == [1, 2, 3]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=5000))
def test_thinning_keeps_the_ends_the_order_and_every_extreme(values: list[float]) -> None:
    points = [(float(i), y) for i, y in enumerate(values)]
    kept = thinned(points, 100)
    assert len(kept) <= 104
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    known = [y for y in values if math.isfinite(y)]
    if known:
        assert {min(known), max(known)} <= {y for _, y in kept}


def test_points_lie_where_they_belong() -> None:
    found = chart("loss", [Line("train", [(0, 0.0), (10, 4.0)])])
    assert found is not None
    assert found.lines[0].path == "M0.0 1000.0L1000.0 0.0"
    assert found.y_ticks[0] == (0.0, "0") and found.y_ticks[-1] == (1000.0, "4")
    assert [label for _, label in found.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_what_is_not_finite_leaves_a_gap() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan), (4.0, 1.0), (5.0, math.inf), (6.0, 2.0)]
    found = chart("loss", [Line("train", points)])
    assert found is not None
    assert found.lines[0].path.count("M") == 3
    assert not re.search("nan|inf", found.lines[0].path)
    assert chart("loss", [Line("train", [(1.0, math.nan)])]) is None
    assert chart("loss", []) is None


def test_a_long_curve_is_thinned_and_its_spike_stays() -> None:
    points = [(float(i), 100.0 if i == 31_415 else 1.0) for i in range(100_000)]
    found = chart("loss", [Line("train", points)])
    assert found is not None
    (line,) = found.lines
    assert line.path.count("L") <= LIMIT + 2 and len(line.path) < 20_000
    assert re.search(r"314\.\d 0\.0", line.path)
    assert line.dots == ""


def test_a_single_value_has_a_dot_and_a_range() -> None:
    found = chart("loss", [Line("eval", [(5.0, 2.0)])], level=(2.5, "base"))
    assert found is not None
    assert found.lines[0].dots.count("M") == 1
    assert found.level is not None and 0 <= found.level[0] <= 1000


def test_the_rows_of_a_figure_with_whatever_stands_among_them() -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": "x"}, {"step": 4}, {"loss": 1.0}]
    rows += [{"step": True, "loss": 1.0}, {"step": 5, "loss": 10**400}, {"step": 6, "loss": True}]
    found = curve(rows, "loss")
    assert [x for x, _ in found] == [1, 2]
    assert finite(found[0]) and not finite(found[1])


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (2.33, "2.330"), (12345.6, "12,346"), (2.5e-4, "2.5e-4"), (0.5, "0.5000"), (999.96, "1000"), (-1.5, "−1.500")],
)
def test_numbers_are_brief(value: float, said: str) -> None:
    assert brief(value) == said


def test_ticks_below_zero_have_a_true_minus() -> None:
    assert labels([-0.5, 0.0, 0.5]) == ["−0.5", "0.0", "0.5"]
    assert labels([-20000.0, 0.0]) == ["−20k", "0"]
    assert labels([-2e-4, 0.0]) == ["−2e-4", "0"]
