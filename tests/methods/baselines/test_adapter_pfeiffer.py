"""Pfeiffer adapters' acceptance properties (arXiv:2005.00247)."""

import torch
from torch import nn

from lorakit import Site, attach, get_method
from tests.laws.subject import awaken, base, batch, far, logits, refusal, same_bits, subject
from tests.methods.baselines.plain import apart, dense, hung


def test_one_module_a_layer_after_the_feed_forward():
    for arch, end in (("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("bert", "output.dense"), ("t5", "DenseReluDense.wo")):
        names = [b.site.name for b in subject("adapter_pfeiffer", arch).branches()]
        assert len(names) == (4 if arch == "t5" else 2)
        assert all(name.endswith("." + end) and "attention" not in name for name in names)


def test_half_of_houlsbys_parameters_and_no_norms():
    sites = [Site(f"l.{i}.{role}", "linear", 768, 768, i, role) for i in range(12) for role in ("o", "down")]
    down = [s for s in sites if s.role == "down"]
    pfeiffer, houlsby = (get_method(name, r=48).count(of) for name, of in (("adapter_pfeiffer", down), ("adapter_houlsby", sites)))
    assert pfeiffer == 12 * (2 * 768 * 48 + 48 + 768) == houlsby // 2
    assert all(p.site is not None for p in subject("adapter_pfeiffer").params())


def test_it_is_houlsbys_module_at_the_feed_forward():
    """Through get_method: the same value."""
    mine = get_method("adapter_pfeiffer", r=4, norm=True, init="near", drop_first=1, drop_random=2)
    theirs = get_method(
        "adapter_houlsby",
        r=4,
        norm=True,
        init="near",
        drop_first=1,
        drop_random=2,
        activation="relu",
        sites="mlp-output",
        train_norms=False,
    )
    assert mine == theirs
    assert mine.recipe.name == "adapter_pfeiffer"


def test_the_forward_and_the_training_are_a_plain_modules():
    adapted = subject("adapter_pfeiffer", "llama", dtype=torch.float64)
    want = logits(hung("llama", dense(adapted, nn.ReLU())), batch())
    assert far(logits(adapted.model, batch()), want) < 1e-12
    adapted = subject("adapter_pfeiffer", "gpt_neox", dtype=torch.float64, awake=False)
    assert apart(adapted, hung("gpt_neox", dense(adapted, nn.ReLU()))) <= 1e-9


def test_several_adapters_take_turns_and_add_up():
    """No weights of the model are trained whole, so that any number can be active."""
    model = base()
    want = logits(model, batch())
    adapted = awaken(attach(model, get_method("adapter_pfeiffer", r=4), name="a"))
    a = logits(model, batch())
    awaken(adapted.add("b", get_method("adapter_pfeiffer", r=2)), seed=2)
    b = logits(model, batch())
    adapted.switch("a", "b")
    both = logits(model, batch())
    assert not torch.equal(both, a)
    assert not torch.equal(both, b)
    assert same_bits(logits(adapted.switch("a").model, batch()), a)
    adapted.scale("a", 0.0)
    assert same_bits(logits(model, batch()), want)


def test_a_module_at_the_attention_would_be_seen():
    adapted = subject("adapter_pfeiffer", sites=["attention-output", "mlp-output"])
    assert len(adapted.branches()) == 4
    assert "mlp-output" in refusal(ValueError, lambda: attach(nn.Sequential(nn.Linear(2, 2)), get_method("adapter_pfeiffer", r=1)))
