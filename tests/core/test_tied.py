"""Tied weights: an adapter changes its own use only; merging unties."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorakit import attach, get_method
from lorakit.core.site import sites_of
from lorakit.data.tiny import tiny_model
from tests.laws.subject import awaken, batch, far, logits, same_bits

TIED = ("llama", "gpt2", "t5")


def embedding(arch: str) -> str:
    return next(s.name for s in sites_of(tiny_model(arch)) if s.kind == "embedding")


@pytest.mark.parametrize("arch", TIED)
def test_adapting_the_embedding_leaves_the_head_alone(arch: str) -> None:
    model = tiny_model(arch, tied=True)
    head, before = model.get_output_embeddings(), model.get_output_embeddings().weight.detach().clone()
    adapted = awaken(attach(model, get_method("lora", sites=embedding(arch))))
    assert "shares its weight" in adapted.notes[0]
    x = torch.randn(3, 32)
    out = head(x)
    assert same_bits(out, torch.nn.functional.linear(x, before)), "live"
    adapted.merge()
    assert same_bits(head(x), out), "merged"
    assert same_bits(head.weight.detach(), before)
    adapted.unmerge()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("sites", [["embedding"], ["lm_head"], ["embedding", "lm_head", "all-linear"]])
def test_a_merged_model_saves_and_loads_with_its_logits(arch: str, sites: list[str], tmp_path: Path) -> None:
    model = tiny_model(arch, tied=True)
    before = logits(model, batch())
    adapted = awaken(attach(model, get_method("lora", sites=sites)))
    live = logits(model, batch())
    merged = logits(adapted.merge(), batch())
    assert far(merged, live) < 1e-5
    assert far(live, before) > 1e-2
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same_bits(logits(again, batch()), merged)
    adapted.unmerge()
    assert model.config.tie_word_embeddings is True
    assert same_bits(logits(adapted.detach(), batch()), before)


def test_merging_elsewhere_keeps_the_tie() -> None:
    model = tiny_model("llama", tied=True)
    awaken(attach(model, get_method("lora"))).merge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_a_trained_head_is_untied_and_a_trained_pair_stays_tied() -> None:
    model = tiny_model("llama", tied=True)
    adapted = attach(model, get_method("lora", unfreeze=("lm_head",)))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    adapted.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = attach(model, get_method("lora", unfreeze=("lm_head", "embed_tokens")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len([p for p in adapted.params() if p.role == "full"]) == 1


def test_a_merged_model_with_a_trained_tied_head_saves_and_loads(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=True)
    adapted = awaken(attach(model, get_method("lora", unfreeze=("lm_head",))))
    want = logits(adapted.merge(), batch())
    assert model.config.tie_word_embeddings is False, "or loading would tie the trained head to the embedding again"
    model.save_pretrained(tmp_path)
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), batch()), want)
