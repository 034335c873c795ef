"""Quantizing a model once: what is stored, what is remembered, and what meets it later."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
from lorakit import AdapterMismatch, CheckpointError, Incompatible, NoSuchSite, attach, get_method, quantize
from lorakit.core.base import base_of
from lorakit.core.fingerprint import fingerprint
from lorakit.core.layer import Branch
from lorakit.data.tiny import ARCHITECTURES, tiny_model
from lorakit.parts.bases.nf4_base import NF4, NF4Spec
from lorakit.parts.bases.quantize import stored_as
from lorakit.train.memory import estimate, measure, weight_bytes
from tests.laws.subject import awaken, batch, is_encoder_decoder, logits, loss_of, same_bits


def packed(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if getattr(type(m), "storage", None) is NF4]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_linear_layers_are_packed_and_heads_embeddings_and_norms_are_not(arch: str) -> None:
    model = quantize(tiny_model(arch))
    left = {n for n, p in model.named_parameters() if p.is_floating_point() and p.ndim > 1}
    names = packed(model)
    assert len(names) >= 8
    assert not [n for n in names if "lm_head" in n or "embed" in n or "cls" in n]
    assert not [n for n in left if any(part in n for part in ("q_proj", "c_attn", "query", "mlp.up_proj", "c_fc"))], left
    assert torch.isfinite(logits(model, batch())).all()


def test_modules_that_the_architecture_keeps_in_fp32_stay() -> None:
    """T5 reads wo.weight.dtype in its forward and casts to it: packed, it would compute on bytes."""
    model = quantize(tiny_model("t5"))
    assert is_encoder_decoder(model)
    assert not [n for n in packed(model) if n.endswith(".wo")]
    assert len([n for n in packed(model) if n.endswith(".wi")]) == 4


def test_which_ones_can_be_chosen_and_a_tied_weight_is_refused() -> None:
    assert packed(quantize(tiny_model("llama"), NF4Spec(sites="down_proj"))) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert packed(quantize(tiny_model("llama"), NF4Spec(sites="lm_head"))) == ["lm_head"]
    with pytest.raises(Incompatible, match="lm_head shares its weight"):
        quantize(tiny_model("llama", tied=True), NF4Spec(sites="lm_head"))
    with pytest.raises(NoSuchSite, match="down_proj"):
        quantize(tiny_model("llama"), NF4Spec(sites="down_porj"))


def test_the_original_weights_are_gone() -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, vocab_size=128)
    before = weight_bytes(model)
    quantize(model)
    linear = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    assert weight_bytes(model) == pytest.approx(before - linear * (4 - 4.127 / 8), rel=2e-3)
    undo = [m for m in model.modules() if hasattr(m, "nf4") and m.nf4.original is not None]
    assert not undo


def test_an_adapted_model_is_refused() -> None:
    adapted = attach(tiny_model("llama"), get_method("lora", r=2))
    with pytest.raises(Incompatible, match="quantize it before the first adapter"):
        quantize(adapted.model)


def test_the_fingerprint_is_that_of_the_model_before() -> None:
    for arch in ("llama", "gpt2"):
        for dtype in (torch.float32, torch.bfloat16):
            assert fingerprint(quantize(tiny_model(arch).to(dtype))) == fingerprint(tiny_model(arch))
    assert fingerprint(quantize(tiny_model("llama", seed=1))) != fingerprint(tiny_model("llama"))
    came_packed = quantize(tiny_model("llama", seed=1))
    for module in came_packed.modules():
        if hasattr(module, "nf4"):
            module.nf4.origin = None
    assert fingerprint(came_packed).rows is None


def test_the_fingerprint_s_mutant_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.parts.bases import host

    monkeypatch.setattr(host, "sample", lambda weight: weight.detach().reshape(-1)[:256].to(torch.bfloat16).view(torch.int16))
    assert fingerprint(quantize(tiny_model("llama"))) != fingerprint(tiny_model("llama"))


# --- adapters on it -----------------------------------------------------------------------------------------------------------


def trained(folder: Path, model: nn.Module, name: str = "lora") -> torch.Tensor:
    adapted = awaken(attach(model, get_method(name, r=2)))
    adapted.save(folder)
    return logits(adapted.model, batch())


@pytest.mark.parametrize("spec", [NF4Spec(), NF4Spec(False, 128), NF4Spec(sites=("q_proj", "down_proj"))])
def test_an_adapter_remembers_its_base_s_storage(spec: NF4Spec, tmp_path: Path) -> None:
    want = trained(tmp_path, quantize(tiny_model("llama"), spec))
    facts = json.loads((tmp_path / "adapter.json").read_text())["meta"]["quantized"]
    assert facts["dtype"] == "float32"
    model = tiny_model("llama")
    again = lorakit.load(quantize(model, stored_as(facts)), tmp_path)
    assert same_bits(logits(again.model.eval(), batch()), want)
    assert not again.notes
    with pytest.raises(AdapterMismatch, match="--force"):
        lorakit.load(quantize(tiny_model("llama", seed=1), spec), tmp_path)


def test_on_a_base_stored_otherwise_it_says_so(tmp_path: Path) -> None:
    trained(tmp_path / "packed", quantize(tiny_model("llama")))
    trained(tmp_path / "plain", tiny_model("llama"))
    assert "base that was quantized, {'dtype'" in (note := lorakit.load(tiny_model("llama"), tmp_path / "packed").notes[0])
    assert note.endswith("this one is not quantized")
    assert "not quantized; this one is quantized, {'nf4'" in lorakit.load(quantize(tiny_model("llama")), tmp_path / "plain").notes[0]
    trained(tmp_path / "own", tiny_model("llama"), "qlora")
    assert not lorakit.load(tiny_model("llama"), tmp_path / "own").notes
    assert not lorakit.load(quantize(tiny_model("llama")), tmp_path / "own").notes


@pytest.mark.parametrize(
    "facts", [{"nf4": {"bits": 4, "sites": "all-linear"}}, {"int4": {}}, {"nf4": 3}, {"nf4": {"blocksize": 3, "sites": "x"}}]
)
def test_a_record_that_is_not_known_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="does not know"):
        stored_as(facts)
    assert stored_as({}) is None


def test_several_adapters_share_the_storage() -> None:
    model = quantize(tiny_model("llama"))
    want = logits(model, batch())
    adapted = awaken(attach(model, get_method("lora", r=2), name="a"))
    awaken(adapted.add("b", get_method("qlora", r=2)), seed=2)
    awaken(adapted.add("c", get_method("dora", r=2)), seed=3)
    hosts: dict[str, set[int]] = {}
    branches: list[Branch] = [b for name in "abc" for b in adapted.branches(name)]
    for branch in branches:
        hosts.setdefault(branch.site.name, set()).add(id(branch.host))
    assert all(len(ids) == 1 for ids in hosts.values())
    outs = [logits(adapted.switch(name).model, batch()) for name in "abc"]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outs))
    with adapted.disabled():
        assert same_bits(logits(model, batch()), want)
    assert same_bits(logits(adapted.detach(), batch()), want)
    assert packed(model)


def test_a_base_is_not_changed_under_an_adapter() -> None:
    adapted = awaken(attach(tiny_model("llama"), get_method("lora", r=2), name="a"))
    want = logits(adapted.model, batch())
    with pytest.raises(Incompatible, match="quantize the model before the first adapter"):
        adapted.add("b", get_method("qlora", r=2))
    assert same_bits(logits(adapted.model, batch()), want)
    other = attach(tiny_model("llama"), get_method("qlora", r=2), name="a")
    with pytest.raises(Incompatible, match="give the same"):
        other.add("b", get_method("qlora", r=2, blocksize=128))
    other.add("b", get_method("lora", r=2)).add("c", get_method("qlora", r=3))


@pytest.mark.parametrize("kept", [True, False])
def test_merged_for_good_it_is_a_plain_model_that_says_the_same(kept: bool) -> None:
    """Adapted or not, every weight is what it stood for; attached to a plain model (`kept`) or to a quantized one."""
    for sites in ("all-linear", "qv"):
        model = tiny_model("llama") if kept else quantize(tiny_model("llama"))
        adapted = awaken(attach(model, get_method("qlora", r=2, sites=sites)))
        want = logits(adapted.model, batch())
        plain = adapted.merge_and_unload()
        torch.testing.assert_close(logits(plain, batch()), want)
        assert not packed(plain)
        assert all(type(m).__module__ != "abc" and not hasattr(m, "nf4") for m in plain.modules())
        assert not hasattr(plain.config, "quantization_config")


def test_unfreezing_packed_codes_is_refused_and_biases_can_learn() -> None:
    model = quantize(tiny_model("qwen2"))
    with pytest.raises(Incompatible, match="down_proj.weight, whose packed codes cannot be trained"):
        attach(model, get_method("lora", r=2, unfreeze=("down_proj",)))
    half = quantize(tiny_model("qwen2").to(torch.bfloat16))
    adapted = attach(half, get_method("lora", r=2, unfreeze=("*.bias",)))
    loss_of(half.train(), batch()).backward()
    assert all(p.tensor.grad is not None for p in adapted.params())
    assert {p.tensor.dtype for p in adapted.params()} == {torch.float32}


def test_a_model_without_values_can_be_planned_with() -> None:
    with torch.device("meta"):
        model = tiny_model("llama", hidden_size=128, intermediate_size=512)
    attach(quantize(model), get_method("lora", r=2))
    real = tiny_model("llama", hidden_size=128, intermediate_size=512)
    attach(quantize(real), get_method("lora", r=2))
    ids = batch()
    inputs = {"input_ids": ids, "labels": ids}
    planned, found = (estimate(m.train(), inputs, optimizer="adamw") for m in (model, real))
    assert planned.activations == found.activations
    assert planned.weights == pytest.approx(found.weights, rel=2e-3)  # a storage that the model shares on meta


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_estimate_of_a_step_s_memory_is_what_is_measured(name: str) -> None:
    model = quantize(tiny_model("llama", hidden_size=256, intermediate_size=1024))
    attach(model, get_method(name, r=4))
    ids = torch.arange(128).view(2, 64)
    inputs = {"input_ids": ids, "labels": ids}
    planned, found = (how(model.train(), inputs, optimizer="adamw") for how in (estimate, measure))
    assert planned.weights == found.weights
    assert planned.activations == pytest.approx(found.activations, rel=1e-3)


def test_transformers_trainer_takes_it(tmp_path: Path) -> None:
    import transformers

    model = quantize(tiny_model("llama"))
    adapted = attach(model, get_method("lora", r=2))
    before = {p.name: p.tensor.detach().clone() for p in adapted.params()}
    rows = [{"input_ids": batch(i)[0], "labels": batch(i)[0]} for i in range(4)]
    args = transformers.TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    transformers.Trainer(model, args, train_dataset=rows).train()
    assert all(not torch.equal(p.tensor, before[p.name]) for p in adapted.params())
    assert isinstance(base_of(model.model.layers[0].mlp.up_proj), NF4)
