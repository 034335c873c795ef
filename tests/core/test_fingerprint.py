"""Fingerprints: the same for every load of one checkpoint, another for other weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorakit import AdapterMismatch, attach, get_method, load
from lorakit.core.fingerprint import Fingerprint, fingerprint
from lorakit.data.tiny import tiny_model
from tests.laws.subject import awaken


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_fp32_and_bf16_loads_of_one_checkpoint_agree(arch: str, tmp_path: Path) -> None:
    tiny_model(arch).save_pretrained(tmp_path)
    wide, narrow = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, torch.bfloat16))
    a, b = fingerprint(wide), fingerprint(narrow)
    assert a == b
    assert a.checkpoint
    assert a.rows
    assert a.matches(b) is True
    in_memory = fingerprint(tiny_model(arch))
    assert in_memory.checkpoint is None
    assert in_memory.matches(a) is True, "without a folder, the rows decide"


def test_other_weights_differ() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    assert before.matches(fingerprint(tiny_model("llama", seed=1))) is False
    assert before.matches(fingerprint(tiny_model("mistral"))) is False or before.rows == fingerprint(tiny_model("mistral")).rows
    awaken(attach(model, get_method("lora"))).merge()
    assert before.matches(fingerprint(model)) is False, "merged"


def test_a_merged_model_saved_is_another_base(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapted = awaken(attach(model, get_method("lora")))
    adapted.save(tmp_path / "adapter")
    adapted.merge()
    for slot_free in (tmp_path / "merged",):
        merged = {k: v for k, v in model.state_dict().items() if ".lora." not in k}
        plain = tiny_model("llama")
        plain.load_state_dict(merged)
        plain.save_pretrained(slot_free)
    with pytest.raises(AdapterMismatch, match="trained on"):
        load(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "adapter")


def test_copies_of_a_folder_agree_and_a_touched_one_does_not(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "c")
    a, b, c = (fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / x)) for x in "abc")
    assert a.checkpoint == b.checkpoint, "however it is cut into files"
    assert a.checkpoint != c.checkpoint
    assert a.rows != c.rows


def test_nothing_to_compare_is_neither_yes_nor_no() -> None:
    assert Fingerprint("a", None, "1").matches(Fingerprint("b", "2", None)) is None
    assert Fingerprint("a", "1", None).matches(Fingerprint("b", "1", "3")) is True
    assert str(Fingerprint("", None, None)) == "unnamed (unknown)"
