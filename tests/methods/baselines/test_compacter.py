"""Compacter's acceptance properties (arXiv:2106.04647)."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit import Adapted, BadParameter, NotMergeable, Site, attach, get_method
from lorakit.parts.deltas import hypercomplex
from lorakit.parts.deltas.hypercomplex import Hypercomplex, HypercomplexSpec, phm
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, everything, far, logits, refusal, same_bits, subject
from tests.methods.baselines.plain import apart, hung, kronecker
from tests.methods.baselines.task import final
from tests.methods.tools import minimize, normal

GELU = nn.GELU(approximate="tanh")


def test_counts():
    """T5-base: ρ (in + out) + out a projection, n³ in total; the paper's 0.05 % for Compacter++ and 0.07 % for Compacter, norms aside."""
    outs = [Site(f"{side}.{i}.{role}", "linear", 768, 768, i, role) for side in "ab" for i in range(12) for role in ("o", "down")]
    downs = [s for s in outs if s.role == "down"]
    site = (768 + 24) + 24 + (24 + 768) + 768
    assert get_method("compacter").count(outs) == 48 * site + 4**3
    assert get_method("compacter", plus=True).count(downs) == 24 * site + 4**3
    assert get_method("compacter", n=8, rho=3).count(downs) == 24 * (2 * 3 * (768 + 24) + 24 + 768) + 8**3
    assert get_method("adapter_houlsby", r=24).count(outs) > 15 * get_method("compacter").count(outs)


def test_where_it_stands_and_what_it_trains():
    assert [b.site.name.rsplit(".", 1)[1] for b in subject("compacter").branches()] == ["o_proj", "down_proj"] * 2
    assert [b.site.name.rsplit(".", 1)[1] for b in subject("compacter", plus=True).branches()] == ["down_proj"] * 2
    adapted = subject("compacter", "bert")
    assert {p.role for p in adapted.params() if p.site is not None} == {"AS", "AT", "BS", "BT", "a", "b"}
    whole = {p.name for p in adapted.params() if p.site is None}
    assert {n for n in whole if not n.startswith("unfrozen.")} == {"lora_shared.pool.R"}
    assert sum("LayerNorm" in n for n in whole) == 2 * (1 + 2 * 2 + 1), "weights and biases of the embeddings', the layers', the head's"


def test_the_rule_is_one_storage_in_every_module():
    adapted = subject("compacter")
    R = adapted.shared("default")["pool"].R
    assert {b.delta.rule[0].R.data_ptr() for b in adapted.branches()} == {R.data_ptr()}
    twin = copy.deepcopy(adapted.model)
    own = twin.lora_shared["default"]["pool"].R
    rules = {m.rule[0].R.data_ptr() for m in twin.modules() if isinstance(m, Hypercomplex)}
    assert rules == {own.data_ptr()}, "a copy's modules share the copy's rule"
    assert own.data_ptr() != R.data_ptr()
    with torch.no_grad():
        before = [logits(m, batch()) for m in (adapted.model, twin)]
        own.mul_(2)
        after = [logits(m, batch()) for m in (adapted.model, twin)]
    assert same_bits(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_the_rule_is_saved_once_and_shared_again_when_loaded(tmp_path):
    adapted = subject("compacter")
    state = adapted.state()
    assert [k for k in state.tensors if k.endswith(".R")] == ["lora_shared.pool.R"]
    adapted.save(tmp_path)
    again = lorakit.load(base(), tmp_path)
    R = again.shared("default")["pool"].R
    assert all(b.delta.rule[0].R is R for b in again.branches())
    assert same_bits(logits(again.model, batch()), logits(adapted.model, batch()))
    Run(again, total=4).step()
    assert not torch.equal(R, adapted.shared("default")["pool"].R), "and learns on"


@pytest.mark.parametrize("kwargs", [{}, {"n": 2, "rho": 3}])
def test_the_forward_is_the_dense_kronecker_sum(kwargs):
    for arch in ("llama", "gpt_neox"):
        adapted = subject("compacter", arch, dtype=torch.float64, train_norms=False, **kwargs)
        want = logits(hung(arch, kronecker(adapted, GELU)), batch())
        assert far(logits(adapted.model, batch()), want) < 1e-12


def test_fifty_steps_follow_a_plain_implementation():
    """Its one rule has one state in the optimizer."""
    adapted = subject("compacter", "gpt_neox", dtype=torch.float64, awake=False, train_norms=False, rule_std=0.5)
    assert apart(adapted, hung("gpt_neox", kronecker(adapted, GELU))) <= 1e-9


def test_the_start_is_the_base_or_near_it():
    want = logits(base(), batch())
    adapted = subject("compacter", awake=False)
    assert same_bits(logits(adapted.model, batch()), want)
    delta = adapted.branches()[0].delta
    assert all(t.count_nonzero() for t in (delta.AS, delta.AT, delta.BS, delta.rule[0].R))
    bound = (2 * 6 / (8 + 1)) ** 0.5
    assert 0.7 * bound < delta.AS.abs().max() <= bound, "Xavier uniform with gain √2 of each 8 × 1 factor"
    gap = far(logits(subject("compacter", awake=False, init="near").model, batch()), want)
    assert 0 < gap < 1e-2
    assert far(logits(subject("compacter", awake=False, init="near", rule_std=0.1).model, batch()), want) > 10 * gap


def test_a_silent_start_learns_in_every_tensor():
    """KAdaptation's official code, whose factors all start at zero, does not."""
    adapted = subject("compacter", awake=False)
    before = {p.name: p.tensor.detach().clone() for p in adapted.params()}
    Run(adapted, total=8).steps(2)
    assert all(not torch.equal(p.tensor, before[p.name]) for p in adapted.params())


def test_off_is_the_base_bit_for_bit():
    model = base("bert")
    bits, want = everything(model), logits(model, batch())
    adapted = awaken(attach(model, get_method("compacter", r=4)))
    assert not torch.equal(logits(model, batch()), want)
    with adapted.disabled():
        assert same_bits(logits(model, batch()), want)
    adapted.detach()
    assert all(same_bits(v, bits[k]) for k, v in everything(model).items())
    assert same_bits(logits(model, batch()), want)


def test_merging_is_refused_with_the_reason():
    assert "not linear" in refusal(NotMergeable, subject("compacter").merge)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 3}, "n=3 does not divide r=4"),
        ({"r": 6, "n": 6}, "n=6 does not divide the width 32"),
        ({"n": 0}, "must be at least 1"),
        ({"rho": 0}, "must be at least 1"),
        ({"rule_std": 0.0}, "learns nothing"),
    ],
)
def test_impossible_values(wrong, says):
    with pytest.raises(BadParameter, match=says):
        attach(base(), get_method("compacter", **{"r": 4, **wrong}))


# --- planted problems -----------------------------------------------------------------------------------------------------------


def module(name: str, **kwargs) -> Adapted:
    """One module on the identity of 8 values, away from its start."""
    host = nn.Linear(8, 8).double()
    with torch.no_grad():
        host.weight.copy_(torch.eye(8))
        host.bias.zero_()
    method = get_method(name, sites="w", activation="tanh", train_norms=False, **kwargs)
    return awaken(attach(nn.ModuleDict({"w": host}), method), seed=0, size=0.7)


def fitted(adapted: Adapted, target: Callable[[Tensor], Tensor], *, steps: int = 2) -> float:
    """The least mean squared error that LBFGS finds."""
    x = normal(100, 8, seed=7)
    with torch.no_grad():
        want = target(x)
    return minimize(adapted, lambda: (adapted.model.w(x) - want).square().mean(), steps=steps)


def test_a_kronecker_module_is_fitted_with_fewer_parameters_than_a_dense_one_needs():
    teacher = module("compacter", r=8, n=2)
    student = awaken(module("compacter", r=8, n=2), seed=3, size=0.05)
    assert fitted(student, teacher.model.w) < 1e-7
    site = student.branches()[0].site
    assert get_method("compacter", r=8, n=2).count([site]) < get_method("adapter_houlsby", r=3).count([site])
    assert fitted(module("adapter_houlsby", r=3), teacher.model.w) > 1e-3


def test_a_dense_module_of_the_same_width_is_beyond_it():
    teacher = module("adapter_houlsby", r=4)
    assert fitted(awaken(module("adapter_houlsby", r=4), seed=3, size=0.05), teacher.model.w) < 1e-10
    assert fitted(module("compacter", r=4, n=2), teacher.model.w) > 1e-2


# --- mutants ----------------------------------------------------------------------------------------------------------------------


def own_rules(self, site, *, pool, dtype, device):
    return Hypercomplex(site, self, copy.deepcopy(pool), dtype=dtype, device=device)


MUTANTS = {
    "every module has a rule of its own": (
        lambda m: m.setattr(HypercomplexSpec, "build", own_rules),
        test_the_rule_is_one_storage_in_every_module,
    ),
    "the rule is not counted": (lambda m: m.setattr(HypercomplexSpec, "count_shared", lambda self, sites: 0), test_counts),
    "the product is turned": (
        lambda m: m.setattr(hypercomplex, "phm", lambda x, R, S, T: phm(x, R.mT, S, T)),
        lambda: test_the_forward_is_the_dense_kronecker_sum({}),
    ),
    "only the first of the ρ columns": (
        lambda m: m.setattr(hypercomplex, "phm", lambda x, R, S, T: phm(x, R, S[..., :1], T[:, :1])),
        lambda: test_the_forward_is_the_dense_kronecker_sum({"n": 2, "rho": 3}),
    ),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_a_mutant_is_seen(what, monkeypatch):
    change, test = MUTANTS[what]
    change(monkeypatch)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.slow
def test_on_a_built_in_task_it_learns_less_than_lora_with_far_fewer_parameters(tmp_path):
    start = final(tmp_path, "lora", learning_rate=1e-12, steps=1)
    lora = final(tmp_path, "lora", learning_rate=5e-3)
    module = final(tmp_path, "compacter", learning_rate=1e-2)
    assert lora < module < start - 0.5 * (start - lora), (start, lora, module)
