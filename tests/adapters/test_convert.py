"""Folder to folder."""

import pytest
import torch

import lorakit
from lorakit.adapters.convert import convert
from lorakit.adapters.io import load_adapter
from tests.adapters.subject import in_peft, logits, shaken, tiny_model


def test_there_and_back(tmp_path):
    adapted = shaken(tiny_model("llama"), "pissa", sites=["q_proj"], unfreeze=("norm",))
    adapted.save(tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", to="peft", native=False, base_model="x/y", task_type="CAUSAL_LM") == ["LORA, exact"]
    torch.testing.assert_close(logits(in_peft(tiny_model("llama"), tmp_path / "b")), logits(adapted.model), atol=1e-5, rtol=1e-5)
    assert convert(tmp_path / "b", tmp_path / "c", to="lorakit") == ["pissa, exact"]
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_an_approximation_says_its_errors(tmp_path):
    model = tiny_model("llama")
    shaken(model, "dora", r=2, sites=["q_proj"]).save(tmp_path / "a")
    lines = convert(tmp_path / "a", tmp_path / "b", native=False, svd_rank=3, model=tiny_model("llama"))
    assert len(lines) == 3
    assert all("relative error" in line for line in lines)
    assert load_adapter(tmp_path / "b", model=model).recipe.kwargs["r"] == 3


def test_a_format_of_no_name(tmp_path):
    with pytest.raises(lorakit.BadParameter, match=r"'pefft' cannot be written. Did you mean 'peft'"):
        convert(tmp_path, tmp_path / "b", to="pefft")
