"""The same (r, s) at every module, in the fewest words."""

import math

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorakit.adapters.peft_rank import config_of, expressed, rank_in, trimmed
from lorakit.core.scale import Rank

NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 10) for p in "qkv"]
KEYS = st.sampled_from(["q_proj", "layers.1.*", r"layers\.0\.self_attn\.k_proj", "nothing", "^model.*v_proj", "1.self_attn.q_proj"])


def by_peft(config, name):
    """PEFT's own resolution (LoraModel._create_and_replace)."""
    r = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"].keys(), name), config["r"])
    alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"].keys(), name), config["lora_alpha"])
    return r, alpha / math.sqrt(r) if config["use_rslora"] else alpha / r


@settings(max_examples=300)
@given(
    r=st.integers(1, 9), alpha=st.floats(0.5, 64), rs=st.booleans(),
    ranks=st.dictionaries(KEYS, st.integers(1, 9), max_size=3), alphas=st.dictionaries(KEYS, st.floats(0.5, 64), max_size=3),
)  # fmt: skip
def test_both_ways_mean_what_peft_means(r, alpha, rs, ranks, alphas):
    config = {"r": r, "lora_alpha": alpha, "use_rslora": rs, "rank_pattern": ranks, "alpha_pattern": alphas}
    wanted = {name: rank_in(config).named(name) for name in NAMES}
    assert wanted == {name: by_peft(config, name) for name in NAMES}
    for rank in (expressed(wanted, rank_in(config)), expressed(wanted)):
        back = config_of(rank)
        for name in NAMES:
            theirs = by_peft({**back, "rank_pattern": dict(sorted(back["rank_pattern"].items()))}, name)
            assert theirs[0] == wanted[name][0]
            assert theirs[1] == pytest.approx(wanted[name][1], rel=1e-14)


def test_the_preferred_words_are_kept_and_idle_patterns_left_out():
    said = Rank.of(4, 8.0, rule="sqrt", rank_pattern={"q_proj": 2, "nothing": 7})
    kept = expressed({name: said.named(name) for name in NAMES}, trimmed(said, NAMES))
    assert config_of(kept) == {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}}


def test_names_made_into_patterns_match_nothing_else():
    wanted = {"a.b": (1, 1.0), "x.a.b": (2, 1.0), "a.bb": (3, 1.0), "a_b": (4, 1.0)}
    rank = expressed(wanted)
    assert {name: rank.named(name) for name in wanted} == wanted
    config = peft.LoraConfig(**config_of(rank))
    assert {name: config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r) for name in wanted} == {
        n: r for n, (r, _) in wanted.items()
    }
