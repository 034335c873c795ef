"""IncreLoRA's acceptance properties (arXiv:2308.12043)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, attach, get_method
from lorakit.core.errors import BadParameter
from lorakit.core.events import Step
from lorakit.methods.rank_allocation import increlora as module
from lorakit.methods.rank_allocation.increlora import RESERVE, Growth, GrowthSpec
from tests.laws.steps import Run, idle
from tests.laws.subject import batch, far, logits, same_bits, subject
from tests.methods.tools import normal, teacher

QUICK: dict[str, Any] = {"target_r": 3, "add": 2}


def ranks(adapted: Adapted) -> list[int]:
    return [b.delta.r - 2 for b in adapted.branches()]


def run_of(total: int = 12, **kwargs: Any) -> Run:
    return Run(subject("increlora", awake=False, sites=["q_proj", "v_proj", "up_proj"], **(QUICK | kwargs)), total=total)


def test_ranks_never_fall_and_end_exactly_at_the_target() -> None:
    for kwargs in ({}, {"interval": 2, "warmup": 1, "top_h": 2}, {"init_r": 2}):
        run = run_of(**kwargs)
        n, seen = len(run.adapted.branches()), [sum(ranks(run.adapted))]
        for _ in range(12):
            run.step()
            seen.append(sum(ranks(run.adapted)))
        assert seen == sorted(seen)
        assert seen[0] == n * kwargs.get("init_r", 1)
        assert seen[-1] == 3 * n
        run.finish()
        assert sum(b.delta.r for b in run.adapted.branches()) == 3 * n
        assert all((b.delta.g != RESERVE).all() for b in run.adapted.branches())


def test_mutant_a_growth_that_overshoots_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official selection adds `add` to every chosen module, whatever is left."""
    monkeypatch.setattr(Growth, "_room", lambda self, i: 2)
    grow = Growth._grow
    monkeypatch.setattr(Growth, "_grow", lambda self, i, more, t: grow(self, i, 2, t))
    sites = ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.up_proj"]
    run = Run(subject("increlora", awake=False, sites=sites, target_r=2, add=2), total=12).steps(12)
    assert sum(ranks(run.adapted)) > 2 * 3


def jump() -> float:
    """How far the logits move at the first growth."""
    run = run_of(add=2)
    run.steps(3)
    before, count = logits(run.adapted.model.eval(), batch()), sum(ranks(run.adapted))
    for controller in run.controllers:
        controller.before_forward(Step(8, 12))
    assert sum(ranks(run.adapted)) > count
    return far(logits(run.adapted.model, batch()), before)


def test_the_function_is_unchanged_at_the_moment_of_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jump() < 1e-4
    monkeypatch.setattr(module, "RESERVE", 1.0)  # a mutant: reserves that count
    assert jump() > 1e-4


def test_a_component_costs_a_row_a_column_and_a_gate_and_the_scale_never_changes() -> None:
    run = run_of()
    scales = {b.delta.s for b in run.adapted.branches()}
    assert scales == {16.0 / 3}
    before, active = run.adapted.params().numel(), ranks(run.adapted)
    run.steps(9)
    grown = sum(
        (r - was) * (b.site.d_in + b.site.d_out + 1) for b, r, was in zip(run.adapted.branches(), ranks(run.adapted), active, strict=True)
    )
    assert run.adapted.params().numel() == before + grown > before
    assert {b.delta.s for b in run.adapted.branches()} == scales
    live = {id(p.tensor) for p in run.adapted.params()}
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == live, "the optimizer holds what trains, and nothing else"


def test_what_is_new_starts_at_rate_zero() -> None:
    """In the step of its birth a component keeps its bits; a step later it moves by 1/ramp of the full step; reserves keep their g."""
    run = run_of(ramp=4)
    (growth,) = run.controllers
    while all(r == 1 for r in ranks(run.adapted)):
        sizes = [b.delta.r for b in run.adapted.branches()]
        run.step()
    i = next(i for i, b in enumerate(run.adapted.branches()) if b.delta.r > sizes[i])
    delta: Any = run.adapted.branches()[i].delta
    born = growth.born[i][-1]
    assert born == run.index - 1
    drawn = normal_rows(run, i, sizes[i], delta)
    assert same_bits(delta.A[sizes[i] :].detach(), drawn)
    old_moved = delta.A[0].detach().clone()
    run.step()
    assert not torch.equal(delta.A[sizes[i]], drawn[0])
    assert not torch.equal(delta.A[0], old_moved)
    assert (delta.g[-2:] == RESERVE).all()
    assert growth._shares([born, born - 4], run.index).tolist() == [0.5, 1.0]


def normal_rows(run: Run, i: int, old: int, delta: Any) -> Tensor:
    """The rows of A that a growth from `old` components draws."""
    from lorakit.core import random
    from lorakit.parts.inits.random import normal as draw

    rng = random.generator(run.adapted.seed, f"{run.adapted.branches()[i].site.name}:{old}")
    return draw(delta.A[old:], module.STD, rng)


def test_the_score_is_that_of_the_dense_gradient() -> None:
    """Σ |ΔW ∘ ∂L/∂ΔW| / √(d_out d_in), against a ΔW that is a leaf."""
    model = nn.Sequential(nn.Linear(6, 5).double())
    adapted = attach(model, get_method("increlora", sites="0", target_r=2, add=2))
    (branch,) = adapted.branches()
    growth = GrowthSpec(1, 2, 2, 1, 0, 0, 0, 0.85, 0.85).build(idle(adapted, 10))
    with torch.no_grad():
        for p in adapted.params():
            p.tensor.copy_(normal(*p.tensor.shape, seed=3))
    x, c = normal(7, 6, seed=1), normal(7, 5, seed=2)
    (model.train()(x) * c).sum().backward()
    G = c.T @ x
    want = (branch.delta.weight() * G).abs().sum() / 7 / 30**0.5
    assert growth.now.item() == pytest.approx(want.item(), rel=1e-12)


def unequal(method: str, **kwargs: Any) -> float:
    """Four linear maps of which one needs rank 8 and the others nothing: the loss after training (catalogue, appendix E, item 1)."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(16, 16, bias=False).double() for _ in range(4))
    adapted = attach(model, get_method(method, sites=["0", "1", "2", "3"], alpha=2.0, **kwargs))
    target = teacher(16, 16, [3.0, 2.8, 2.6, 2.4, 2.2, 2.0, 1.8, 1.6])
    W = [m.weight.detach().clone() for m in model]
    total = 700
    run = idle(adapted, total)
    run.optimizer, run.total_ = torch.optim.Adam([p.tensor for p in adapted.params()], lr=2e-2), lambda tensor: None
    controllers = [spec.build(run) for spec in adapted.methods["default"].controllers]
    for controller in controllers:
        controller.start()
    eye = torch.eye(16, dtype=torch.float64)
    for i in range(total):
        for controller in controllers:
            controller.before_forward(Step(i, total))
        now = [m(eye).T - w for m, w in zip(model.train(), W, strict=True)]
        loss = (now[0] - target).square().sum() + sum(n.square().sum() for n in now[1:])
        run.optimizer.zero_grad()
        loss.backward()
        for controller in controllers:
            controller.after_backward(Step(i, total))
        run.optimizer.step()
        for controller in controllers:
            controller.after_step(Step(i, total))
    return loss.item()


def test_it_wins_where_the_sites_need_unequal_ranks() -> None:
    """Uniform LoRA r = 2 has a floor; growth gives the needy site more."""
    floor = sum(s * s for s in (2.6, 2.4, 2.2, 2.0, 1.8, 1.6))
    assert unequal("lora", r=2) == pytest.approx(floor, rel=1e-2)
    assert unequal("increlora", target_r=2, add=2, orth=0.0, ramp=5) < 0.6 * floor


def test_it_loses_where_training_is_too_short_for_what_it_grows_late() -> None:
    """On one site that needs all its rank at once, components that come late have learned less."""
    target = teacher(16, 16, [3.0, 2.8, 2.6, 2.4, 2.2, 2.0, 1.8, 1.6])

    def after(method: str, **kwargs: Any) -> float:
        torch.manual_seed(0)
        one = nn.ModuleList([nn.Linear(16, 16, bias=False).double()])
        adapted = attach(one, get_method(method, sites="0", alpha=8.0, **kwargs))
        W, total = one[0].weight.detach().clone(), 120
        run = idle(adapted, total)
        run.optimizer, run.total_ = torch.optim.Adam([p.tensor for p in adapted.params()], lr=2e-2), lambda tensor: None
        controllers = [spec.build(run) for spec in adapted.methods["default"].controllers]
        for i in range(total):
            for c in controllers:
                c.before_forward(Step(i, total))
            loss = (one.train()[0](torch.eye(16, dtype=torch.float64)).T - W - target).square().sum()
            run.optimizer.zero_grad()
            loss.backward()
            for c in controllers:
                c.after_backward(Step(i, total))
            run.optimizer.step()
            for c in controllers:
                c.after_step(Step(i, total))
        return loss.item()

    assert after("increlora", target_r=8, add=2) > 1.5 * after("lora", r=8)


def test_a_resume_across_growths_gives_the_same_bits_and_a_file_keeps_the_ranks() -> None:
    straight = run_of().steps(12)
    for at in (2, 5, 8):
        again = run_of().restore(run_of().steps(at).state()).steps(12 - at)
        for name, tensor in straight.adapted.tensors("default").items():
            assert same_bits(tensor, again.adapted.tensors("default")[name]), (at, name)
    want = logits(straight.finish().model, batch())
    fresh = subject("increlora", awake=False, sites=["q_proj", "v_proj", "up_proj"], **QUICK)
    fresh.add("saved", straight.adapted.state())
    assert same_bits(logits(fresh.model.eval(), batch()), want)
    factors = straight.adapted.state().factors()
    assert sum(len(f.A) for f in factors.values()) == 3 * len(factors)


def test_a_run_too_short_for_its_schedule_is_refused() -> None:
    with pytest.raises(BadParameter, match=r"need \d+ growths"):
        run_of(interval=5)
    with pytest.raises(BadParameter, match="init_r=4"):
        get_method("increlora", init_r=4, target_r=3)
    with pytest.raises(BadParameter, match="at least"):
        get_method("increlora", add=0)


def test_a_target_that_cannot_be_reached_is_refused() -> None:
    """Growth takes `add` a step at each site, and reserves need room beside what is active."""
    with pytest.raises(BadParameter, match=r"in this run's 4 steps they get \d+ of"):
        run_of(total=4, target_r=20, add=2)
    with pytest.raises(BadParameter, match="room for"):
        run_of(total=60, target_r=31, add=2)
    for total in (3, 5, 12):  # what is accepted arrives
        run = run_of(total=total, target_r=3, add=2).steps(total)
        assert sum(ranks(run.adapted)) == 3 * len(run.adapted.branches())
