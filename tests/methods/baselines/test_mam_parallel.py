"""The scaled parallel adapter's acceptance properties (arXiv:2110.04366)."""

import pytest
import torch
from torch import nn

import lorakit
from lorakit import Incompatible, NotMergeable, Site, attach, get_method
from lorakit.parts.combines.module import Beside
from lorakit.parts.deltas.entrances import Entrances
from tests.laws.subject import awaken, base, batch, everything, far, logits, refusal, same_bits, subject
from tests.methods.baselines.plain import apart, dense, hung
from tests.methods.baselines.task import final

BOTH = ["attention-output", "mlp-output"]


def test_counts():
    """BART-large's width at the paper's r = 512; the module reads d, not the feed-forward's inner width."""
    downs = [Site(f"layers.{i}.fc2", "linear", 4096, 1024, i, "down") for i in range(24)]
    assert get_method("mam_parallel", r=512).count(downs) == 24 * (2 * 1024 * 512 + 512 + 1024)
    assert {b.delta.A.shape for b in subject("mam_parallel", sites=BOTH).branches()} == {(4, 32)}


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gpt2"])
def test_the_forward_is_the_papers(arch):
    adapted = subject("mam_parallel", arch, dtype=torch.float64, sites=BOTH)
    assert {b.delta.s for b in adapted.branches()} == {4.0}
    want = logits(hung(arch, dense(adapted, nn.ReLU()), beside=True), batch())
    assert far(logits(adapted.model, batch()), want) < 1e-12
    assert far(logits(hung(arch, dense(adapted, nn.ReLU())), batch()), want) > 1e-3


def test_fifty_steps_follow_a_plain_implementation():
    adapted = subject("mam_parallel", "gpt_neox", dtype=torch.float64, awake=False, sites=BOTH)
    assert apart(adapted, hung("gpt_neox", dense(adapted, nn.ReLU()), beside=True)) <= 1e-9


def test_every_architectures_block_input_is_found():
    found = {}
    for arch in ("llama", "gpt2", "gpt_neox", "bert", "t5", "qwen3"):
        adapted = subject("mam_parallel", arch, sites=BOTH)
        found[arch] = {b.site.name: b.delta.reads[0] for b in adapted.branches()}
        assert torch.isfinite(logits(adapted.model, batch())).all()
    assert found["llama"]["model.layers.1.mlp.down_proj"] == "model.layers.1.mlp.up_proj"
    assert found["gpt2"]["transformer.h.0.attn.c_proj"] == "transformer.h.0.attn.c_attn"
    assert found["bert"]["bert.encoder.layer.1.output.dense"] == "bert.encoder.layer.1.intermediate.dense"
    t5 = found["t5"]
    assert t5["decoder.block.0.layer.1.EncDecAttention.o"] == "decoder.block.0.layer.1.EncDecAttention.q"
    assert t5["encoder.block.1.layer.1.DenseReluDense.wo"] == "encoder.block.1.layer.1.DenseReluDense.wi"


def test_saved_and_loaded_it_reads_the_same_modules(tmp_path):
    adapted = subject("mam_parallel", sites=BOTH)
    adapted.save(tmp_path)
    again = lorakit.load(base(), tmp_path)
    assert [b.delta.reads for b in again.branches()] == [b.delta.reads for b in adapted.branches()]
    assert same_bits(logits(again.model, batch()), logits(adapted.model, batch()))


def test_off_is_the_base_and_detach_leaves_no_trace():
    model = base()
    names, bits, want = [n for n, _ in model.named_modules()], everything(model), logits(model, batch())
    adapted = attach(model, get_method("mam_parallel", r=4))
    assert same_bits(logits(model, batch()), want), "and so is its start"
    awaken(adapted)
    assert not torch.equal(logits(model, batch()), want)
    with adapted.disabled():
        assert same_bits(logits(model, batch()), want)
    adapted.detach()
    assert [n for n, _ in model.named_modules()] == names, "the modules that were only read are plain again"
    assert same_bits(logits(model, batch()), want)
    assert all(same_bits(v, bits[k]) for k, v in everything(model).items())


def test_merging_is_refused_with_the_reason():
    assert "not linear" in refusal(NotMergeable, subject("mam_parallel").merge)


def test_generation_with_a_cache_is_generation_without_one():
    model = subject("mam_parallel", sites=BOTH).model
    out = [model.generate(batch(), max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*out)


def test_the_whole_mam_adapter_has_a_prefix_too():
    adapted = subject("mam_parallel", prefix=3)
    shared = adapted.shared("default")
    assert "prefix" in shared
    method = adapted.methods["default"]
    assert not method.identity
    count = method.count([b.site for b in adapted.branches()]) + sum(p.count(adapted.model) for p in method.patches)
    assert adapted.params().numel() == count > subject("mam_parallel").params().numel()
    want = logits(base(), batch())
    with adapted.disabled():
        assert same_bits(logits(adapted.model, batch()), want)
    assert not torch.equal(logits(adapted.model, batch()), want)


def test_a_block_whose_input_did_not_run_is_told_so():
    adapted = subject("mam_parallel")
    with pytest.raises(Incompatible, match=r"reads the input of 'model\.layers\.0\.mlp\.up_proj', which did not run"):
        adapted.model.model.layers[0].mlp.down_proj(torch.randn(1, 64))


MUTANTS = {
    "it reads the inner activations": lambda m: m.setattr(
        Beside, "forward", lambda self, x, y, base, delta, ctx: delta(x[..., : delta.width], ctx)
    ),
    "it reads the frozen output": lambda m: m.setattr(Beside, "forward", lambda self, x, y, base, delta, ctx: delta(y, ctx)),
    "it reads another layer's input": lambda m: m.setattr(
        Entrances, "of", lambda self, site: (self.paths[site.name].replace("layers.1", "layers.0"),)
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_a_mutant_is_seen(what, monkeypatch):
    MUTANTS[what](monkeypatch)
    with pytest.raises(AssertionError):
        test_the_forward_is_the_papers("gpt_neox")


@pytest.mark.slow
def test_on_a_built_in_task_it_learns_as_lora_does(tmp_path):
    start = final(tmp_path, "lora", learning_rate=1e-12, steps=1)
    lora = final(tmp_path, "lora", learning_rate=5e-3)
    module = final(tmp_path, "mam_parallel", learning_rate=5e-3, sites=BOTH)
    assert module < start - 0.7 * (start - lora), (start, lora, module)
