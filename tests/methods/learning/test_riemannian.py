"""Riemannian preconditioned LoRA's acceptance properties (arXiv:2402.02347)."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor

from lorakit import Adapted, BadParameter, attach, get_method
from lorakit.core.lowrank import LowRank
from lorakit.parts.optimizers import riemannian as part
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.parts.optimizers.riemannian import Riemannian, damped_inverses
from lorakit.parts.optimizers.sgd import SGD
from tests.adapters.subject import quiet
from tests.adapters.test_trajectory_peft import STEPS, TARGETS, TOLERANCE, batches, counterparts, same_start
from tests.adapters.test_trajectory_peft import base as base64
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, loss_of, same_bits, small, subject
from tests.methods.tools import layer, normal, teacher, whole

SWAPPED = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def split(adapted: Adapted, B: Tensor, A: Tensor) -> LowRank:
    """The only layer's delta, set to these factors."""
    delta = adapted.branches()[0].delta
    assert isinstance(delta, LowRank)
    with torch.no_grad():
        delta.A.copy_(A), delta.B.copy_(B)
    return delta


def toy(rule: str = "sgd", *, r: int = 3, **kwargs: Any) -> Adapted:
    return layer(get_method("riemannian", r=r, alpha=float(r), rule=rule, **kwargs))


def moved(adapted: Adapted, B: Tensor, A: Tensor, *, lr: float = 1e-7) -> Tensor:
    """The change of ΔW in one step from these factors, over lr."""
    delta, target = split(adapted, B, A), teacher(10, 12, [3.0, 2.0, 1.0])
    before = delta.weight().detach().clone()
    W = adapted.model.w.weight.detach()
    (whole(adapted) - W - target).square().sum().backward()
    adapted.methods["default"].optim.build(adapted.params(), lr=lr).step()
    return (delta.weight().detach() - before) / lr


# --- the mathematics --------------------------------------------------------------------------------------------------------------


def dependence(**kwargs: Any) -> float:
    """How much a step of SGD depends on the way ΔW is split into B and A."""
    B, A, M = normal(10, 3, seed=1), normal(3, 12, seed=2), normal(3, 3, seed=3) + 2 * torch.eye(3, dtype=torch.float64)
    return far(moved(toy(**kwargs), B @ M, torch.linalg.solve(M, A)), moved(toy(**kwargs), B, A))


def test_a_step_of_sgd_does_not_depend_on_how_the_update_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dependence(reg=1e-10) < 1e-5
    assert dependence(reg=1e9) > 0.1, "plain descent's does"
    monkeypatch.setattr(part, "damped_inverses", lambda grams, reg: [torch.eye(len(g), dtype=g.dtype) for g in grams])
    assert dependence(reg=1e-10) > 0.1, "a mutant without preconditioning is seen"


def test_a_step_is_the_sum_of_two_projections_of_the_gradient() -> None:
    B, A = normal(10, 3, seed=1), normal(3, 12, seed=2)
    adapted = toy(reg=1e-12)
    G = 2 * (B @ A - teacher(10, 12, [3.0, 2.0, 1.0]))
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    assert far(moved(adapted, B, A), -(P_B @ G + G @ P_A)) < 1e-5


def test_a_large_reg_is_plain_descent() -> None:
    B, A = normal(10, 3, seed=1), normal(3, 12, seed=2)
    plain = layer(get_method("lora", r=3, alpha=3.0, sites="w").but(optim=SGD()))
    assert far(moved(toy(reg=1e8), B, A, lr=1e-7 * 1e8) * 1e8, moved(plain, B, A)) < 1e-6
    assert far(moved(toy(reg=1e2), B, A, lr=1e-7 * 1e2) * 1e2, moved(plain, B, A)) > 1e-3


def test_orthonormal_factors_gain_nothing() -> None:
    """Where it cannot win: BᵀB = AAᵀ = I is conditioned already."""
    B, A = torch.linalg.qr(normal(10, 3, seed=1)).Q, torch.linalg.qr(normal(12, 3, seed=2)).Q.T
    plain = layer(get_method("lora", r=3, alpha=3.0, sites="w").but(optim=SGD()))
    assert far(moved(toy(reg=1e-9), B, A), moved(plain, B, A)) < 1e-6


def steps_to(adapted: Adapted, target: Tensor, start: tuple[Tensor, Tensor], lr: float, most: int) -> int:
    """Steps of SGD until ‖ΔW − target‖ ≤ 1e-6 ‖target‖."""
    delta = split(adapted, *start)
    optimizer = adapted.methods["default"].optim.build(adapted.params(), lr=lr)
    for i in range(most):
        optimizer.zero_grad()
        loss = (delta.weight() - target).square().sum()
        if loss <= 1e-12 * target.square().sum():
            return i
        loss.backward()
        optimizer.step()
    return most


def test_a_badly_conditioned_factorization_takes_a_tenth_of_the_steps() -> None:
    """κ = 1000, from balanced factors of the target with noise."""
    target = teacher(10, 12, [1.0, 0.1, 0.01, 1e-3])
    U, S, Vh = torch.linalg.svd(target)
    root = S[:4].sqrt()
    start = U[:, :4] * root + 0.01 * normal(10, 4, seed=3), root[:, None] * Vh[:4] + 0.01 * normal(4, 12, seed=4)
    scaled = steps_to(toy(r=4, reg=1e-9), target, start, 0.25, 400)
    assert scaled < 60
    plain = layer(get_method("lora", r=4, alpha=4.0, sites="w").but(optim=SGD()))
    assert min(steps_to(plain, target, start, lr, 10 * scaled) for lr in (0.4, 0.2, 0.1)) == 10 * scaled


# --- the real PEFT ----------------------------------------------------------------------------------------------------------------


def apart(arch: str, rule: str, *, reg: float = 1e-2) -> tuple[float, float]:
    """The largest difference of losses and of trained tensors after 50 steps beside PEFT's create_riemannian_optimizer."""
    model = base64(arch)
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[arch])).train()
    adapted = attach(model.train(), get_method("riemannian", r=4, alpha=8.0, rule=rule, reg=reg))
    same_start(adapted, theirs)
    settings = {"lr": 1e-2, "weight_decay": 0.01}
    built = [
        adapted.methods["default"].optim.build(adapted.params(), **settings),
        create_riemannian_optimizer(theirs, SWAPPED[rule], reg=1e-2, **settings),
    ]
    losses: list[list[float]] = [[], []]
    for ids in batches():
        for k, m in enumerate((adapted.model, theirs)):
            loss = m(input_ids=ids, labels=ids).loss
            loss.backward()
            built[k].step()
            built[k].zero_grad()
            losses[k].append(loss.item())
    assert len(losses[0]) == STEPS
    assert losses[1][-1] < losses[1][0] - 0.1  # it did train
    tensors = max((a - b).abs().max().item() for _, a, b in counterparts(adapted, theirs))
    return max(abs(a - b) for a, b in zip(*losses, strict=True)), tensors


@pytest.mark.parametrize("rule", SWAPPED)
@pytest.mark.parametrize("arch", TARGETS)
def test_the_same_trajectory_as_peft(arch: str, rule: str) -> None:
    assert max(apart(arch, rule)) <= TOLERANCE


def one_after_the_other(self: Any, optimizer: Any, args: Any, kwargs: Any) -> None:
    """The preconditioners of each other's factor."""
    pairs = [(a.tensor, b.tensor) for a, b in self.table.pairs()]
    for A, B in pairs:
        for_B, for_A = damped_inverses([B.mT @ B, A @ A.mT], self.reg)
        self._exchange(A, for_A @ A.grad), self._exchange(B, B.grad @ for_B)


def test_mutants_are_seen_beside_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(apart("gpt_neox", "adamw", reg=1e-2 * (1 + 1e-5))) > TOLERANCE
    monkeypatch.setattr(part._Around, "before", torch.no_grad()(one_after_the_other))
    assert min(apart("gpt_neox", "adamw")) > TOLERANCE


# --- as a part --------------------------------------------------------------------------------------------------------------------


def test_raw_gradients_are_back_after_the_step_and_parameters_in_no_pair_are_plain() -> None:
    def stepped(name: str) -> tuple[Adapted, dict[str, Tensor], dict[str, Tensor]]:
        method = get_method("dora", r=4, unfreeze=("lm_head",)).but(optim=get_method(name).optim)
        adapted = awaken(attach(base(), method))
        before = {p.name: p.tensor.detach().clone() for p in adapted.params()}
        loss_of(adapted.model, batch()).backward()
        grads = {p.name: p.tensor.grad.clone() for p in adapted.params()}
        (method.optim or AdamW()).build(adapted.params(), lr=1e-2).step()
        assert all(same_bits(p.tensor.grad, grads[p.name]) for p in adapted.params())
        return adapted, before, grads

    (one, _, _), (plain, before, _) = stepped("riemannian"), stepped("lora")
    for p, q in zip(one.params(), plain.params(), strict=True):
        assert same_bits(p.tensor, q.tensor) == (p.role not in "AB"), p.name
        assert not torch.equal(p.tensor, before[p.name])


def test_the_optimizers_state_is_the_base_rules_and_goes_round() -> None:
    run = Run(subject("riemannian"), total=8).steps(2)
    saved = run.optimizer.state_dict()
    assert {k for s in saved["state"].values() for k in s} == {"step", "exp_avg", "exp_avg_sq"}
    other = subject("riemannian").methods["default"].optim.build(run.adapted.params(), lr=1e-2)
    other.load_state_dict(saved)
    for p in run.adapted.params():
        assert all(torch.equal(v, run.optimizer.state[p.tensor][k]) for k, v in other.state[p.tensor].items())
    assert not Run(subject("riemannian", rule="sgd"), total=8).steps(2).optimizer.state_dict()["state"]


def test_ranks_may_grow_between_two_steps() -> None:
    """The step after growing is the one that a fresh optimizer with the same moments would take."""

    def grown(late: bool) -> Adapted:
        run = Run(subject("riemannian", rule="sgd"), total=8).steps(1)
        for branch in run.adapted.branches():
            assert isinstance(branch.delta, LowRank)
            branch.delta.resize(6, None if late else run.optimizer)
            with torch.no_grad():
                branch.delta.A[4:].normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        if late:
            run._make_optimizer()
        return run.steps(2).adapted

    early, late = grown(False), grown(True)
    assert early.branches()[0].delta.A.shape[0] == 6
    assert all(same_bits(v, late.tensors("default")[k]) for k, v in early.tensors("default").items())


def test_stacks_of_experts_have_a_preconditioner_each() -> None:
    method = small("riemannian", sites="experts", rule="sgd", reg=1e-3)
    adapted = awaken(attach(base("mixtral", torch.float64), method))
    (a, b) = adapted.params().pairs()[0]
    A, B = a.tensor.detach().clone(), b.tensor.detach().clone()
    loss_of(adapted.model, batch()).backward()
    grad = a.tensor.grad.clone()
    method.optim.build(adapted.params(), lr=1.0).step()
    for e in range(len(A)):
        want = torch.linalg.solve(B[e].T @ B[e] + 1e-3 * torch.eye(4, dtype=torch.float64), grad[e])
        assert far(A[e] - a.tensor[e].detach(), want) < 1e-9


def test_rates_of_the_base_rule_are_kept() -> None:
    """LoRA+ below: B learns ratio times faster."""
    adapted = subject("riemannian")
    built = Riemannian(AdamW(ratios=(("B", 16.0),))).build(adapted.params(), lr=1e-3)
    assert {n[-1]: g["lr"] for g in built.param_groups for n in g["names"]} == {"A": 1e-3, "B": 16e-3}


@pytest.mark.parametrize("reg", [0.0, -1e-6])
def test_a_reg_that_cannot_be(reg: float) -> None:
    with pytest.raises(BadParameter, match="reg > 0"):
        get_method("riemannian", reg=reg)


def test_a_closure_is_refused() -> None:
    adapted = subject("riemannian")
    built = adapted.methods["default"].optim.build(adapted.params(), lr=1e-3)
    closure: Callable[[], float] = lambda: 0.0  # noqa: E731
    for call in (lambda: built.step(closure), lambda: built.step(closure=closure)):
        with pytest.raises(BadParameter, match="closure"):
            call()


def test_the_first_steps_of_sgd_with_a_tiny_reg_explode() -> None:
    """The pitfall that the docstring names: after step 0 B is tiny, and (BᵀB + reg)⁻¹ is nearly 1/reg."""
    largest = {}
    for reg in (1e-6, 1e-1):
        run = Run(subject("riemannian", awake=False, rule="sgd", reg=reg), total=8, lr=1e-4)
        start = {p.name: p.tensor.detach().clone() for p in run.adapted.params()}
        run.steps(2)
        largest[reg] = max((p.tensor - start[p.name]).abs().max().item() for p in run.adapted.params().by_role("A"))
    assert largest[1e-6] > 30 * largest[1e-1]
