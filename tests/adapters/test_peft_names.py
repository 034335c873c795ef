"""Which modules a configuration means, as PEFT itself says it."""

import re

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from lorakit.adapters.peft_names import matches, module_names, parsed, saved_module, selected, targets
from lorakit.adapters.peft_types import TYPES
from lorakit.core.errors import CheckpointError
from tests.adapters.subject import shaken, tiny_model

SEGMENTS = st.sampled_from(["q", "k", "qq", "layers", "h", "0", "1", "10", "attn", "lm_head"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=5).map(".".join)


@settings(max_examples=500)
@given(
    name=NAMES,
    wanted=st.one_of(st.lists(NAMES, max_size=3), st.sampled_from([".*q", r"h\.\d+\.q", "q|k"])),
    excluded=st.one_of(st.none(), st.lists(NAMES, max_size=2), st.just(".*0.*")),
    saved=st.one_of(st.none(), st.lists(NAMES, max_size=2)),
    layers=st.one_of(st.none(), st.integers(0, 1), st.lists(st.sampled_from([0, 1, 10]), max_size=2)),
    pattern=st.one_of(st.none(), st.just("layers"), st.lists(st.sampled_from(["layers", "h"]), max_size=2)),
)
def test_matching_is_pefts(name, wanted, excluded, saved, layers, pattern):
    if isinstance(wanted, str):
        layers = pattern = None  # PEFT refuses both together
    elif layers is None:
        pattern = None
    fields = {
        "target_modules": wanted,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    assert matches(fields, name) == bool(check_target_module_exists(peft.LoraConfig(**fields), name))


class Named:
    """A model that is only its names."""

    def __init__(self, names):
        self.names = names

    def named_modules(self):
        return [("", None), *((n, None) for n in self.names)]


@settings(max_examples=300)
@given(names=st.sets(NAMES, min_size=1, max_size=12), data=st.data())
def test_targets_mean_these_modules_and_no_other(names, data):
    wanted = data.draw(st.sets(st.sampled_from(sorted(names)), min_size=1))
    for model in (Named(names), None):
        found = targets(wanted, model)
        config = peft.LoraConfig(target_modules=found)
        hits = {n for n in names if check_target_module_exists(config, n)}
        assert hits >= wanted
        if model is not None:
            assert hits == wanted
            assert selected({"target_modules": found}, wanted, model)


def test_targets_of_whole_kinds_are_their_last_names():
    model = tiny_model("gpt2")
    names = module_names(model)
    assert targets([n for n in names if n.endswith(("c_attn", "mlp.c_proj"))], model) == ["c_attn", "mlp.c_proj"]
    assert targets(["transformer.h.1.attn.c_attn"], model) == ["1.attn.c_attn"]


def test_adapters_are_no_modules():
    model = tiny_model("llama")
    before = module_names(model)
    assert module_names(shaken(model, "lora").model) == before


def test_keys():
    lora, adalora = (TYPES[name].table.keys for name in ("LORA", "ADALORA"))
    plain = ["linear", "experts", "router"]  # told apart by the tensors and the name
    assert parsed("model.q_proj.lora_A.weight", lora) == ("model.q_proj", plain, "A")
    assert parsed("model.embed.lora_embedding_B", lora) == ("model.embed", ["embedding"], "B")
    assert parsed("model.embed.lora_magnitude_vector", lora) == ("model.embed", ["linear", "embedding"], "m")
    assert parsed("model.q_proj.lora_E", adalora) == ("model.q_proj", ["linear"], "E")
    assert parsed("model.q_proj.lora_E", lora) is None
    assert parsed("model.lora_A.weight", lora) == ("model", plain, "A")


def test_saved_modules_are_found_as_peft_finds_them():
    assert saved_module("classifier.dense.weight", ["classifier", "score"]) == "classifier"
    assert saved_module("model.norm.weight", ["norm"]) == "model.norm"
    assert saved_module("model.norm.weight", ["score"]) is None


def test_patterns_that_take_forever_are_not_tried():
    from pathlib import Path

    from lorakit.adapters.pattern import checked

    for fine in [
        "q_proj",
        r"^model\.layers\.0\.self_attn\.(q|k)_proj$",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        "a{2}",
        r"a\+\+\+\+\+\+",
    ]:
        assert re.compile(checked(fine, Path("x")))
    for endless in ["(a+)+", "(a|a)*b", "(?:a*)*c", "(x{1,}){2,}", ".*.*.*.*.*y", "a" * 2000, "(", "(?P<x"]:
        with pytest.raises(CheckpointError):
            checked(endless, Path("x"))
