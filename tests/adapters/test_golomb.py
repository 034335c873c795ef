"""Golomb's code: every set of places comes back, in as many bits as the textbook's code takes, which is close to the entropy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters import golomb


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """(places, length), from none to all."""
    length = draw(st.integers(0, 400))
    chosen = draw(st.sets(st.integers(0, max(0, length - 1)), max_size=length)) if length else set()
    return np.array(sorted(chosen), np.int64), length


def textbook(gap: int, m: int) -> int:
    """Bits of one number in Golomb's code."""
    q, rest = divmod(gap, m)
    width = math.ceil(math.log2(m))
    return q + 1 + (width if rest >= 2**width - m or m == 1 else width - 1)


@given(rows(), st.integers(1, golomb.LARGEST), st.binary(max_size=2))
def test_places_come_back_whatever_follows(row, m, behind):
    places, length = row
    bits = golomb.encode(places, length, m)
    found, used = golomb.decode(np.concatenate([bits, np.frombuffer(behind, np.uint8) % 2]), len(places), length, m)
    assert found.tolist() == places.tolist()
    assert used == len(bits)
    gaps = np.diff(places, prepend=-1, append=length) - 1
    assert len(bits) == sum(textbook(int(gap), m) for gap in gaps)


def test_a_row_by_hand():
    """Gaps 4, 0, 2 at m = 3: q 1, 0, 0 and rests 1, 0, 2 of 2, 1 and 2 bits, which are 10, 0 and 11."""
    bits = golomb.encode(np.array([4, 5]), 8, 3)
    assert "".join(map(str, bits)) == "0111" + "101" + "01"


@pytest.mark.parametrize("p", [0.001, 0.0051, 0.01, 0.05, 0.1, 0.2, 0.3, 0.38, 0.4, 0.5, 0.9])
def test_the_parameter_is_the_best_one(p):
    m, q = golomb.parameter(p), 1 - p
    if m < golomb.LARGEST:
        assert q**m + q ** (m + 1) <= 1 < q ** (m - 1) + q**m
    else:
        assert q**m + q ** (m + 1) > 1


def test_the_parameter_at_the_ends():
    assert (golomb.parameter(0), golomb.parameter(1), golomb.parameter(1e-9)) == (golomb.LARGEST, 1, golomb.LARGEST)


@pytest.mark.parametrize(("p", "over"), [(0.005, 0.006), (0.05, 0.007), (0.1, 0.009), (0.2, 0.01), (0.3, 0.01), (0.4, 0.032), (0.5, 0.001)])
def test_random_places_take_little_more_than_their_entropy(p, over):
    n = 200_000
    places = np.flatnonzero(np.random.default_rng(0).random(n) < p)
    k = len(places) / n
    entropy = -k * math.log2(k) - (1 - k) * math.log2(1 - k)
    assert 0.999 < len(golomb.encode(places, n, golomb.parameter(k))) / (n * entropy) < 1 + over


@pytest.mark.parametrize("m", [1, 3, 8])
def test_bits_of_no_such_row_are_refused(m):
    places, length = np.array([3, 4, 30]), 40
    bits = golomb.encode(places, length, m)
    for end in range(len(bits)):
        with pytest.raises(ValueError, match="gaps are there|it ends after|make a row of"):
            golomb.decode(bits[:end], 3, length, m)
    for count, size in ((3, 39), (3, 41), (2, length)):
        with pytest.raises(ValueError, match="the gaps make a row of"):
            golomb.decode(bits, count, size, m)
    with pytest.raises(ValueError, match="gaps are there where 99 were announced"):
        golomb.decode(bits, 98, length, m)
