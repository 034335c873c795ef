"""BitFit's acceptance properties (arXiv:2106.10199)."""

import copy

import pytest
import torch
from torch import nn

from lorakit import NotExportable, NotMergeable, attach, get_method
from lorakit.adapters.peft import to_peft
from lorakit.methods.baselines.bitfit import Shifted, ShiftSpec
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, everything, far, logits, refusal, same_bits, subject
from tests.methods.baselines.plain import loss
from tests.methods.baselines.task import final
from tests.methods.tools import fit, layer, minimize, normal, teacher, whole


def test_every_bias_of_the_encoder_is_trained_and_nothing_else():
    for arch in ("bert", "gpt2", "gpt_neox"):
        adapted = subject("bitfit", arch, awake=False)
        model = base(arch)
        head = ("cls.", "bert.pooler", "lm_head", "embed_out")
        biases = {n: p.numel() for n, p in model.named_parameters() if n.endswith("bias") and not n.startswith(head)}
        found = {p.name.removeprefix("unfrozen.").removesuffix(".b") for p in adapted.params()}
        trained = {n for n in found if not n.startswith("cls.")}
        assert {n.removesuffix(".bias") for n in trained} == {n.removesuffix(".bias") for n in biases}
        assert {p.role for p in adapted.params()} == {"b", "full"}
        assert all(len(p.tensor.shape) == 1 for p in adapted.params())


def test_counts():
    """BERT-base: 0.08 to 0.09 % of the parameters, as the paper says; here in closed form for the tiny one."""
    adapted = subject("bitfit", "bert")
    sites = [b.site for b in adapted.branches()]
    assert get_method("bitfit").count(sites) == sum(s.d_out for s in sites) == 2 * (4 * 32 + 64 + 32)
    llama = subject("bitfit", "llama")
    assert llama.params().numel() == get_method("bitfit").count([b.site for b in llama.branches()]), "Llama's norms have no biases"


def test_fifty_steps_follow_training_of_the_biases_themselves():
    """fp64, AdamW: b of the sites and the norms' biases against requires_grad of the plain model's own."""
    adapted = attach(base("gpt_neox", torch.float64), get_method("bitfit"))
    plain = base("gpt_neox", torch.float64)
    theirs = [p.requires_grad_(n.endswith("bias")) for n, p in plain.named_parameters()]
    theirs = [p for p in theirs if p.requires_grad]
    ours = [p.tensor for p in adapted.params()]
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.0) for ps in (ours, theirs)]
    history = []
    for i in range(50):
        losses = [loss(m, batch(i % 5)) for m in (adapted.model, plain)]
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        history.append([value.item() for value in losses])
    assert history[-1][0] < history[0][0] - 0.1
    assert max(abs(a - b) for a, b in history) <= 1e-9
    merged = adapted.merge_and_unload()
    assert far(logits(merged, batch()), logits(plain, batch())) < 1e-9
    for name, p in plain.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), p, rtol=0, atol=1e-9)


def test_a_smaller_set_of_biases():
    """The query's and the first feed-forward layer's."""
    adapted = subject("bitfit", "bert", sites=["query", "intermediate.dense"], train_norms=False)
    assert {b.site.role for b in adapted.branches()} == {"q", "up"}
    assert adapted.params().numel() == 2 * (32 + 64)


def test_a_model_without_biases_gets_them_and_cannot_be_merged():
    adapted = subject("bitfit", "llama")
    assert all(b.base.bias is None for b in adapted.branches())
    live = logits(adapted.model, batch())
    assert "q_proj has no bias to merge" in refusal(NotMergeable, adapted.merge)
    assert same_bits(logits(adapted.model, batch()), live)
    with pytest.raises(NotExportable, match="changes more than W"):
        adapted.state().factors()


def test_no_export_pretends_to_hold_it(tmp_path):
    for name in ("bitfit", "adapter_houlsby"):
        state = subject(name).state()
        for svd_rank in (None, 4):
            said = refusal(NotExportable, lambda state=state, rank=svd_rank: to_peft(state, tmp_path, svd_rank=rank))
            assert "svd_rank" not in said


def test_merging_adds_to_the_bias_alone_and_is_undone_exactly():
    for arch, sites in (("gpt2", "all-linear"), ("gpt2", ["c_attn[q]", "c_attn[v]"]), ("bert", "all-linear"), ("qwen2", "attention")):
        adapted = subject("bitfit", arch, sites=["q_proj", "k_proj", "v_proj"] if arch == "qwen2" else sites)
        hosts = {b.site.module: b.host.module for b in adapted.branches()}
        assert hosts
        before = {n: (m.weight.detach().clone(), m.bias.detach().clone(), id(m.bias)) for n, m in hosts.items()}
        live = logits(adapted.model, batch())
        merged = logits(adapted.merge(), batch())
        assert far(merged, live) < 1e-5
        assert all(same_bits(m.weight.detach(), before[n][0]) and not torch.equal(m.bias, before[n][1]) for n, m in hosts.items())
        adapted.unmerge()
        assert all(same_bits(m.bias.detach(), before[n][1]) and id(m.bias) == before[n][2] for n, m in hosts.items())
        assert same_bits(logits(adapted.model, batch()), live)


def test_a_part_of_a_fused_bias_moves_that_part_only():
    adapted = subject("bitfit", "gpt2", sites=["c_attn[v]"], train_norms=False)
    (branch, _) = adapted.branches()
    change = branch.bias().detach()
    assert not change[:64].count_nonzero()
    assert change[64:].count_nonzero() == 32


def test_the_start_and_off_are_the_base():
    model = base("bert")
    bits, want = everything(model), logits(model, batch())
    adapted = attach(model, get_method("bitfit"))
    assert same_bits(logits(model, batch()), want)
    awaken(adapted)
    with adapted.disabled():
        assert same_bits(logits(model, batch()), want)
    adapted.detach()
    assert all(same_bits(v, bits[k]) for k, v in everything(model).items())


def test_the_bias_of_the_keys_is_invisible_where_positions_are_not_rotary():
    for arch, sites, visible in (("gpt2", ["c_attn[k]"], False), ("llama", "k_proj", True)):
        adapted = subject("bitfit", arch, sites=sites, dtype=torch.float64, train_norms=False)
        gap = far(logits(adapted.model, batch()), logits(base(arch, torch.float64), batch()))
        assert (gap > 1e-6) == visible


# --- planted problems -----------------------------------------------------------------------------------------------------------


def test_a_shift_is_fitted_and_a_change_of_the_weight_is_not():
    shift = normal(10, seed=5)
    adapted = layer(get_method("bitfit", sites="w"))
    x, host = normal(50, 12, seed=6), adapted.model.w
    want = (x @ host.weight.T + host.bias + shift).detach()
    assert minimize(adapted, lambda: (host(x) - want).square().mean(), steps=3) < 1e-12
    assert far(adapted.branches()[0].delta.b.detach(), shift) < 1e-6
    lora = layer(get_method("lora", r=1, alpha=1.0, sites="w"))
    assert minimize(lora, lambda: (lora.model.w(x) - want).square().mean(), steps=3) > 0.1, "whose update is zero at x = 0"
    change = teacher(10, 12, [1.0])
    bias = layer(get_method("bitfit", sites="w"))
    W = bias.model.w.weight.detach().clone()
    assert minimize(bias, lambda: (whole(bias) - W - change).square().sum(), steps=3) > 0.5
    assert fit(layer(get_method("lora", r=1, sites="w")), change) < 1e-8


def test_it_learns():
    adapted = subject("bitfit", awake=False)
    run = Run(adapted, total=40, data=lambda i: batch(i % 3))
    losses = [run.step().item() for _ in range(40)]
    assert losses[-1] < losses[0] - 0.2


# --- mutants ----------------------------------------------------------------------------------------------------------------------

MUTANTS = {
    "the bias is not counted": (lambda m: m.setattr(ShiftSpec, "count", lambda self, site: 0), test_counts),
    "the merge forgets the bias": (
        lambda m: m.setattr(Shifted, "bias", lambda self, base, delta: None),
        test_merging_adds_to_the_bias_alone_and_is_undone_exactly,
    ),
    "the merge takes it twice": (
        lambda m: m.setattr(Shifted, "bias", lambda self, base, delta: 2 * delta.b),
        test_merging_adds_to_the_bias_alone_and_is_undone_exactly,
    ),
    "the shift is scaled by x": (
        lambda m: m.setattr(Shifted, "forward", lambda self, x, y, base, delta, ctx: x.norm(dim=-1, keepdim=True) * delta(x, ctx)),
        test_fifty_steps_follow_training_of_the_biases_themselves,
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_a_mutant_is_seen(what, monkeypatch):
    change, test = MUTANTS[what]
    change(monkeypatch)
    with pytest.raises((AssertionError, AttributeError)):
        test()


def test_a_copy_of_the_model_has_its_own():
    adapted = subject("bitfit", "gpt2")
    twin = copy.deepcopy(adapted.model)
    assert same_bits(logits(twin, batch()), logits(adapted.model, batch()))
    assert isinstance(twin.transformer.h[0].attn.c_attn, nn.Module)


@pytest.mark.slow
def test_on_a_built_in_task_it_learns_less_than_lora_with_far_fewer_parameters(tmp_path):
    start = final(tmp_path, "lora", learning_rate=1e-12, steps=1)
    lora = final(tmp_path, "lora", learning_rate=5e-3)
    biases = final(tmp_path, "bitfit", learning_rate=1e-2)
    assert lora < biases < start - 0.4 * (start - lora), (start, lora, biases)
