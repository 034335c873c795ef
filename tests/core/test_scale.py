"""The one scale resolver."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit import BadParameter, Site, attach, get_method
from lorakit.core.scale import Rank
from lorakit.data.tiny import tiny_model


def site(name: str = "model.layers.0.self_attn.q_proj", d_in: int = 4096, d_out: int = 4096) -> Site:
    return Site(name, "linear", d_in, d_out, 0, "q")


@given(r=st.integers(1, 4096), alpha=st.floats(0.25, 512))
def test_rules(r: int, alpha: float) -> None:
    assert Rank.of(r, alpha).at(site()) == (r, alpha / r)
    assert Rank.of(r, alpha, rule="sqrt").at(site()) == (r, alpha / math.sqrt(r))
    assert Rank.of(r, alpha, rule="guarded").at(site()) == (r, alpha / (r + 1e-5))
    assert Rank.of(r, alpha, rule="constant").at(site()) == (r, alpha)


def test_patterns_match_the_end_of_a_name_on_a_dot() -> None:
    rank = Rank.of(8, 16, rank_pattern={"q_proj": 4, r"layers\.1\..*": 2}, alpha_pattern={"v_proj": 32})
    assert rank.at(site("layers.0.q_proj")) == (4, 4.0)
    assert rank.at(site("model.layers.1.mlp.up_proj")) == (2, 8.0)
    assert rank.at(site("layers.0.v_proj")) == (8, 4.0)
    assert rank.at(site("layers.0.xq_proj")) == (8, 2.0)
    assert rank.at(site("layers.0.q_proj.inner")) == (8, 2.0)


def test_a_pattern_acts_in_training_merging_and_at_rest_alike() -> None:
    method = get_method("rslora", r=4, alpha=8, rank_pattern={"v_proj": 9}, alpha_pattern={"v_proj": 6}, sites="qv")
    adapted = attach(tiny_model("llama"), method)
    want = {"q_proj": (4, 4.0), "v_proj": (9, 2.0)}
    for branch in adapted.branches():
        r, s = want[branch.site.name.rsplit(".", 1)[1]]
        assert (branch.delta.r, branch.delta.s) == (r, s)
        assert branch.factors().s == s
    for name, f in adapted.state().factors().items():
        assert (len(f.A), f.s) == want[name.rsplit(".", 1)[1]]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"r": 0}, "r must be at least 1"),
        ({"r": 4, "rank_pattern": {"q_proj": 0}}, "q_proj=0"),
        ({"r": 4, "rank_pattern": {"q_proj(": 2}}, "not a regular expression"),
        ({"r": 4, "rank_pattern": {"q_porj": 2}}, "Did you mean 'q_proj'"),
        ({"r": 4, "alpha_pattern": {"embed": 2.0}}, "none of the 14 adapted sites"),
        ({"r": 33}, "exceeds the matrix"),
        ({"r": 4, "rank_pattern": {"up_proj": 40}}, "r <= 32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(kwargs: dict[str, object], says: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(BadParameter, match=re.escape(says)):
        attach(model, get_method("lora", **kwargs))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear"
    assert not model._forward_pre_hooks
