"""Houlsby adapters' acceptance properties (arXiv:1902.00751), and AdapterDrop's (arXiv:2010.11918)."""

import pytest
import torch
from torch import nn

from lorakit import BadParameter, Incompatible, NoSuchSite, NotMergeable, Site, attach, get_method
from lorakit.adapters.drop import without_first
from lorakit.core import random
from lorakit.core import site as site_module
from lorakit.core.attach import attach_adapter
from lorakit.parts.combines.module import Serial
from lorakit.parts.deltas.bottleneck import Bottleneck, BottleneckSpec, Form
from lorakit.parts.inits import module as inits
from lorakit.parts.inits import random as random_inits
from lorakit.parts.inits.module import Near, Silent
from lorakit.parts.unfrozen.norms import Norms
from tests.laws.subject import awaken, base, batch, everything, far, logits, loss_of, refusal, same_bits, subject
from tests.methods.baselines.plain import apart, dense, hung
from tests.methods.baselines.task import final
from tests.methods.tools import minimize, normal

GELU = nn.GELU(approximate="tanh")


@pytest.mark.parametrize(
    ("arch", "ends"),
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("gpt2", ["attn.c_proj", "mlp.c_proj"]),
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"]),
        ("bert", ["attention.output.dense", "output.dense"]),
        ("t5", ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"]),
    ],
)
def test_the_modules_stand_where_each_block_ends(arch, ends):
    names = [b.site.name for b in subject("adapter_houlsby", arch).branches()]
    assert all(any(name.endswith("." + end) for end in ends) for name in names)
    assert len(names) == (2 * 2 if arch != "t5" else 2 * 2 + 2 * 3), "every attention and every feed-forward of two layers has one"


def gpt3(role: str, i: int) -> Site:
    return Site(f"layers.{i}.{role}", "linear", 12288 if role == "o" else 49152, 12288, i, role)


def test_counts_are_the_lora_papers():
    """|Θ| = L (2 d r + r + d), its section 5.1; table 4's GPT-3 with Adapter^H (7.1M, 40.1M)."""
    sites = [gpt3(role, i) for i in range(96) for role in ("o", "down")]
    for r, printed in ((1, "7.1M"), (8, "40.1M")):
        found = get_method("adapter_houlsby", r=r).count(sites)
        assert found == 192 * (2 * 12288 * r + r + 12288)
        assert f"{found / 1e6:.1f}M" == printed
    norm = get_method("adapter_houlsby", r=8, norm=True).count(sites)
    assert norm - get_method("adapter_houlsby", r=8).count(sites) == 192 * 2 * 12288


def test_what_is_trained():
    adapted = subject("adapter_houlsby", "bert", awake=False)
    roles = {p.role for p in adapted.params() if p.site is not None}
    assert roles == {"A", "a", "B", "b"}
    whole = {p.name for p in adapted.params() if p.site is None}
    norms = {n for n, m in base("bert").named_modules() if isinstance(m, nn.LayerNorm)}
    assert whole == {f"unfrozen.{n}.{k}" for n in norms for k in ("weight", "bias")}
    assert not {p.name for p in subject("adapter_houlsby", "bert", train_norms=False).params() if p.site is None}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gpt2"])
def test_the_forward_is_the_papers(arch, parallel):
    adapted = subject("adapter_houlsby", arch, dtype=torch.float64, train_norms=False, scale=1.5, norm=True, parallel=parallel)
    want = logits(hung(arch, dense(adapted, GELU), beside=parallel), batch())
    assert far(logits(adapted.model, batch()), want) < 1e-12
    assert far(logits(hung(arch, dense(adapted, GELU), beside=not parallel), batch()), want) > 1e-3, "the two forms are not the same"
    assert far(logits(hung(arch, dense(adapted, nn.ReLU()), beside=parallel), batch()), want) > 1e-4


@pytest.mark.parametrize("parallel", [False, True])
def test_fifty_steps_follow_a_plain_implementation(parallel):
    adapted = subject("adapter_houlsby", "gpt_neox", dtype=torch.float64, awake=False, train_norms=False, parallel=parallel)
    assert apart(adapted, hung("gpt_neox", dense(adapted, GELU), beside=parallel)) <= 1e-9


def test_a_scale_wrong_in_the_sixth_digit_is_seen():
    adapted = subject("adapter_houlsby", "gpt_neox", dtype=torch.float64, awake=False, train_norms=False)
    twins = dense(adapted, GELU)
    for twin in twins.values():
        twin.s *= 1 + 1e-6
    assert apart(adapted, hung("gpt_neox", twins)) > 1e-9


def test_the_start_is_the_base_or_near_it():
    want = logits(base(), batch())
    assert same_bits(logits(subject("adapter_houlsby", awake=False).model, batch()), want)
    gaps = []
    for std in (0.1, 0.01, 0.001):
        adapted = subject("adapter_houlsby", awake=False, init="near", std=std)
        assert all(b.delta.A.abs().max() <= 2 * std and 0.8 * std < b.delta.B.std() < std for b in adapted.branches()), "cut at two std"
        gaps.append(far(logits(adapted.model, batch()), want))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] > 0


def test_off_is_the_base_bit_for_bit():
    model = base("bert")
    bits, want = everything(model), logits(model, batch())
    adapted = awaken(attach(model, get_method("adapter_houlsby", r=4)))
    assert not torch.equal(logits(model, batch()), want)
    with adapted.disabled():
        assert same_bits(logits(model, batch()), want)
    adapted.detach()
    assert same_bits(logits(model, batch()), want)
    assert all(same_bits(v, bits[k]) for k, v in everything(model).items())


def test_merging_is_refused_with_the_reason():
    adapted = subject("adapter_houlsby")
    live = logits(adapted.model, batch())
    assert "not linear" in refusal(NotMergeable, adapted.merge)
    with pytest.raises(NotMergeable, match="no change of the weight"):
        adapted.branches()[0].weight()
    assert same_bits(logits(adapted.model, batch()), live), "and nothing happened"


def test_rank_pattern_gives_a_layer_its_own_width():
    adapted = subject("adapter_houlsby", rank_pattern={r"layers\.1\..*": 2})
    assert {b.delta.r for b in adapted.branches() if b.site.layer == 1} == {2}
    assert {b.delta.r for b in adapted.branches() if b.site.layer == 0} == {4}


# --- where the sites cannot be found ----------------------------------------------------------------------------------------


def test_an_unknown_architecture_is_told_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(NoSuchSite, match=r"known to be what the preset 'attention-output' means; name them.*There are: 0, 2"):
        attach(model, get_method("adapter_houlsby", r=2))
    half = nn.ModuleDict({"o_proj": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    with pytest.raises(NoSuchSite, match="mlp-output"):
        attach(half, get_method("adapter_houlsby", r=2))
    assert len(attach(model, get_method("adapter_houlsby", r=2, sites=["0", "2"])).branches()) == 2


def test_a_parallel_module_needs_to_know_the_blocks_input():
    half = nn.ModuleDict({"o_proj": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    with pytest.raises(Incompatible, match="no module in the layer of site 'o_proj' reads its block's input.*serial form"):
        attach(half, get_method("adapter_houlsby", r=2, sites="o_proj", parallel=True))
    assert not any("lora" in name for name, _ in half.named_modules()), "the model is as it was"


def test_impossible_values():
    for wrong in ({"init": "zeros"}, {"activation": "swish"}, {"r": 0}, {"std": -1.0, "init": "near"}, {"drop_first": 2}):
        with pytest.raises((BadParameter, NoSuchSite)):
            attach(base(), get_method("adapter_houlsby", **{"r": 4, **wrong}))


# --- AdapterDrop --------------------------------------------------------------------------------------------------------------


def hidden(model: nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(input_ids=batch(), output_hidden_states=True).hidden_states


def test_drop_first_leaves_the_first_layers_alone():
    model = base(num_hidden_layers=4)
    want = hidden(model)
    adapted = awaken(attach(model, get_method("adapter_houlsby", r=4, drop_first=3, train_norms=False)))
    assert {b.site.layer for b in adapted.branches()} == {3}
    got = hidden(model)
    assert all(same_bits(a, b) for a, b in zip(got[:4], want, strict=False))
    assert not torch.equal(got[4], want[4])
    with pytest.raises(NoSuchSite, match="leaving out 4 layers is not possible with sites in 4 layers; expected 0 to 3"):
        attach(base(num_hidden_layers=4), get_method("adapter_houlsby", r=4, drop_first=4))


def test_drop_random_trains_one_adapter_that_does_without_any_of_its_first_layers():
    kwargs = {"r": 4, "train_norms": False, "drop_random": 3}
    adapted = subject("adapter_houlsby", model={"num_hidden_layers": 4}, **kwargs)
    shorter = {n: attach_adapter(base(num_hidden_layers=4), without_first(adapted.state(), n)) for n in range(4)}
    want = {n: logits(short.model, batch()) for n, short in shorter.items()}
    assert all(not torch.equal(want[0], want[n]) for n in (1, 2, 3))
    assert same_bits(logits(adapted.model, batch()), want[0]), "nothing is silent outside training"
    seen = set()
    for step in range(40):
        with adapted.given(step=step):
            got = logits(adapted.model.train(), batch())
        (n,) = [n for n, w in want.items() if far(got, w) < 1e-6]
        seen.add(n)
    assert seen == {0, 1, 2, 3}


def test_silence_replays_when_activations_are_recomputed():
    found = []
    for checkpointing in (False, True):
        adapted = subject("adapter_houlsby", model={"num_hidden_layers": 4}, drop_random=3, dropout=0.25)
        model = adapted.model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        losses = []
        for step in (1, 2, 3):
            with adapted.given(step=step):
                losses.append(loss_of(model, batch(step)))
        sum(losses).backward()
        found.append([p.tensor.grad for p in adapted.params()])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


# --- planted problems -----------------------------------------------------------------------------------------------------------


def one_layer(method, d_in: int = 8, d_out: int = 6):
    host = nn.Linear(d_in, d_out).double()
    with torch.no_grad():
        host.weight.copy_(normal(d_out, d_in, seed=100))
        host.bias.copy_(normal(d_out, seed=101))
    return attach(nn.ModuleDict({"w": host}), method)


def best(name: str, target, *, tries: int = 3, **kwargs) -> float:
    """The least mean squared error that LBFGS finds from some starts."""
    x = normal(200, 8, seed=7)
    found = []
    for seed in range(tries):
        adapted = awaken(one_layer(get_method(name, sites="w", **kwargs)), seed=seed, size=0.5)
        with torch.no_grad():
            want = target(x, nn.functional.linear(x, adapted.model.w.weight, adapted.model.w.bias))
        found.append(minimize(adapted, lambda a=adapted, w=want: (a.model.w(x) - w).square().mean(), steps=6))
    return min(found)


def test_a_nonlinear_change_of_the_output_is_fitted_where_a_linear_one_is_not():
    A, B = normal(2, 6, seed=11), normal(6, 2, seed=12)

    def target(x, y):
        return y + torch.tanh(y @ A.T) @ B.T

    assert best("adapter_houlsby", target, r=2, activation="tanh", train_norms=False) < 1e-8
    assert best("lora", target, tries=1, r=6, alpha=6.0) > 1e-2, "of any rank"


def test_a_linear_change_of_the_input_is_loras():
    """The module sees W x only: what W drops of x is lost to it, and two units make no linear map of rank two."""
    C, D = normal(2, 8, seed=13), normal(6, 2, seed=14)

    def target(x, y):
        return y + x @ C.T @ D.T

    assert best("lora", target, tries=1, r=2, alpha=2.0) < 1e-12
    assert best("adapter_houlsby", target, r=2, activation="relu", train_norms=False) > 1e-2


@pytest.mark.slow
def test_on_a_built_in_task_modules_learn_as_lora_does(tmp_path):
    start = final(tmp_path, "lora", learning_rate=1e-12, steps=1)
    lora = final(tmp_path, "lora", learning_rate=5e-3)
    module = final(tmp_path, "adapter_houlsby", learning_rate=5e-3)
    assert lora < start - 1
    assert module < start - 0.7 * (start - lora), (start, lora, module)


def test_a_module_that_read_its_input_would_be_seen(monkeypatch):
    """A mutant of the serial combine."""
    adapted = subject("adapter_houlsby", "gpt_neox", dtype=torch.float64, train_norms=False, sites="attention.dense")
    want = logits(hung("gpt_neox", dense(adapted, GELU)), batch())
    monkeypatch.setattr(Serial, "forward", lambda self, x, y, base, delta, ctx: delta(x, ctx))
    assert far(logits(adapted.model, batch()), want) > 1e-4


# --- mutants ----------------------------------------------------------------------------------------------------------------------


def own_draw(self, like, ctx):
    drawn = random.dropout_mask(torch.ones(1, dtype=like.dtype), ctx.key, self.stream, self.silence)
    return (drawn > 0).to(like.dtype)


MUTANTS = {
    "biases not counted": (lambda m: m.setattr(Form, "count", lambda self, site, width: 0), test_counts_are_the_lora_papers),
    "norms forgotten": (lambda m: m.setattr(Norms, "__call__", lambda self, module, parameter: False), test_what_is_trained),
    "norms' biases only": (lambda m: m.setattr(Norms, "__call__", lambda self, module, name: name == "bias"), test_what_is_trained),
    "each layer draws for itself": (
        lambda m: m.setattr(Bottleneck, "speaks", own_draw),
        test_drop_random_trains_one_adapter_that_does_without_any_of_its_first_layers,
    ),
    "the last layers are silent": (
        lambda m: m.setattr(Form, "silence", lambda self, site: (site.layer + 1) / (self.drop_random + 1)),
        test_drop_random_trains_one_adapter_that_does_without_any_of_its_first_layers,
    ),
    "A is not cut at two std": (lambda m: m.setattr(inits, "truncated", random_inits.normal), test_the_start_is_the_base_or_near_it),
    "B starts random": (lambda m: m.setattr(Silent, "__call__", Near(0.01).__call__), test_the_start_is_the_base_or_near_it),
    "no layer is left out": (
        lambda m: m.setattr(site_module, "_beyond", lambda sites, n: sites),
        test_drop_first_leaves_the_first_layers_alone,
    ),
    "the module claims to be linear": (
        lambda m: (m.setattr(BottleneckSpec, "linear", True), m.setattr(Bottleneck, "linear", True)),
        test_merging_is_refused_with_the_reason,
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_a_mutant_is_seen(what, monkeypatch):
    change, test = MUTANTS[what]
    test()
    change(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        test()
