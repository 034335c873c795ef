"""Nothing that a text holds becomes part of the page."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.train.page import duration, environment, figure, plain, signed, size, spelled


@given(st.text(max_size=200))
def test_text_is_never_markup(text: str) -> None:
    made = environment().from_string('<p title="{{ text|plain }}">{{ text|plain }}</p>').render(text=text)
    assert re.fullmatch(r'<p title="[^"<>]*">[^<>]*</p>', made)
    made.encode()


def test_what_hides_is_shown() -> None:
    assert plain("a\x00b\x1b[31m\u202ec\r\nd\te") == "a\u2400b\u241b[31m\ufffdc\nd\te"
    assert plain("\ud800") == "\ufffd"


def test_long_texts_are_cut_and_say_so() -> None:
    assert plain("x" * 5000) == "x" * 3000 + " … (2,000 more characters)"
    assert plain(["a", {"b": None}]) == '["a", {"b": null}]'


def test_a_name_that_a_template_misspells_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        environment().from_string("{{ nothing }}").render()


def test_figures() -> None:
    assert [figure(v) for v in (2.3304, 262656, None, 1e12, "x")] == ["2.330", "262,656", "–", "1e+12", "x"]
    assert [figure(v) for v in (-0.0226, -3, -2.5e-4, -1e12, "-1")] == ["−0.0226", "−3", "−2.5e-4", "−1e+12", "-1"], "true minuses"
    assert figure(float("nan")) == "nan" and figure(float("-inf")) == "−inf"
    assert [spelled(k) for k in ("kl", "entity_f1", "reward_chosen")] == ["KL", "entity F1", "reward chosen"]
    assert [signed(v) for v in (0.5, -2.163, 0.0, None, float("nan"))] == ["+0.5000", "−2.163", "±0", "–", "–"]
    assert [size(v) for v in (12, 31_000_000, 1.07e6, 999_600, None)] == ["12 bytes", "31 MB", "1.07 MB", "1,000 kB", "–"]
    assert [duration(v) for v in (0.31, 38.4, 245, 7801)] == ["0.31 s", "38 s", "4 min 05 s", "2 h 10 min"]
