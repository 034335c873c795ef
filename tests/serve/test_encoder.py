"""Texts as vectors: by a base's hidden states, and by a sentence encoder in a folder."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from lorakit.core.attach import attach_adapter
from lorakit.core.errors import CheckpointError, Incompatible
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.serve.encoder import HiddenMean, Sentences
from tests.laws.subject import same_bits
from tests.serve.values import far, made

TEXTS = ["the first", "another one that is a good deal longer", "x"]


def test_a_vector_is_the_mean_of_the_last_hidden_states() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = HiddenMean(model, tokenizer).encode(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            want = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert far(vector, want) < 1e-6


def test_a_vector_is_of_its_text_alone() -> None:
    encoder = HiddenMean(tiny_model("llama"), tiny_tokenizer())
    together = encoder.encode(TEXTS)
    assert all(same_bits(encoder.encode([text])[0], vector) for text, vector in zip(TEXTS, together, strict=True))
    assert not torch.equal(together[0], together[1])


def test_long_texts_lose_their_beginning_and_an_empty_one_has_a_vector() -> None:
    encoder = HiddenMean(tiny_model("llama"), tiny_tokenizer())
    tail = "q" * 256
    assert far(encoder.encode(["z" * 50 + tail])[0], encoder.encode([tail])[0]) < 1e-6
    assert bool(encoder.encode([""]).isfinite().all())


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
def test_other_bases(arch: str) -> None:
    encoder = HiddenMean(tiny_model(arch), tiny_tokenizer())
    assert encoder.encode(TEXTS).shape == (3, 32)


def test_it_is_the_bases_whatever_is_attached_later() -> None:
    model = tiny_model("llama")
    encoder = HiddenMean(model, tiny_tokenizer())
    before, name = encoder.encode(TEXTS), encoder.name
    adapted = attach_adapter(model, made(1))
    assert far(encoder.encode(TEXTS), before) > 1e-2
    with adapted.disabled():
        assert same_bits(encoder.encode(TEXTS), before)
    assert encoder.name == name
    with pytest.raises(Incompatible, match="adapted already"):
        HiddenMean(model, tiny_tokenizer())
    adapted.detach()
    assert HiddenMean(model, tiny_tokenizer()).name == name != HiddenMean(tiny_model("llama", seed=1), tiny_tokenizer()).name


# ----------------------------------------------------------------------------------------------------------------- sentence encoders
def folder(path: Path, arch: str = "t5", *, dense: bool = False) -> Path:
    """As sentence-transformers saves one."""
    tokenizer = tiny_tokenizer()
    tiny_model(arch, vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    if dense:
        (path / "2_Dense").mkdir()
        (path / "2_Dense" / "config.json").write_text(json.dumps({"activation_function": "torch.nn.modules.linear.Identity"}))
        W = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
        safetensors.torch.save_file({"linear.weight": W}, path / "2_Dense" / "model.safetensors")
    return path


@pytest.mark.parametrize(("arch", "dense"), [("t5", True), ("bert", False)])
def test_the_instruction_is_read_and_not_counted(tmp_path: Path, arch: str, dense: bool) -> None:
    path = folder(tmp_path / "encoder", arch, dense=dense)
    encoder = Sentences(path, "Task: ")
    model, tokenizer = encoder.model, encoder.tokenizer
    found = encoder.encode(["hello you"])[0]
    ids = tokenizer("Task: hello you", return_tensors="pt")["input_ids"]
    n = len(tokenizer("Task: ")["input_ids"])
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state[0]
    want = hidden[n:].mean(0)
    want = F.normalize(encoder.dense @ want if dense else want, dim=0)
    assert far(found, want) < 1e-5
    assert far(found, F.normalize(encoder.dense @ hidden.mean(0) if dense else hidden.mean(0), dim=0)) > 1e-3
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)
    assert far(Sentences(path, "Other: ").encode(["hello you"])[0], found) > 1e-3, "it is read"
    assert Sentences(path, "Other: ").name != encoder.name


def test_what_is_no_encoder_of_this_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        Sentences("some/model")
    path = folder(tmp_path / "a", dense=True)
    (path / "2_Dense" / "config.json").write_text(json.dumps({"activation_function": "torch.nn.modules.activation.Tanh"}))
    with pytest.raises(Incompatible, match="Tanh"):
        Sentences(path)
    (path / "2_Dense" / "model.safetensors").rename(path / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle is never opened"):
        Sentences(path)
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(Incompatible, match="another pooling"):
        Sentences(path)
    (path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        Sentences(path)
