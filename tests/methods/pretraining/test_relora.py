"""ReLoRA's acceptance properties (arXiv:2307.05695)."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit import Adapted, get_method
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.events import Step
from lorakit.core.lowrank import LowRank
from lorakit.methods.pretraining.relora import relora
from lorakit.parts.controllers import restart as module
from lorakit.parts.controllers.restart import Restart
from tests.laws.steps import Run, idle
from tests.laws.subject import batch, far, logits, same_bits, subject
from tests.methods.tools import layer, teacher, whole


def made(period: int = 300, warmup: int = 10, **kwargs: Any) -> Adapted:
    return layer(get_method("relora", r=2, alpha=2.0, dropout=0.0, period=period, warmup=warmup, sites="w", **kwargs))


def train(adapted: Adapted, target: Tensor, steps: int, *, lr: float = 2e-2) -> Iterator[tuple[int, float, Tensor]]:
    """(step, loss, W') of Adam on ‖W' − W − target‖², W the weight before training."""
    W = adapted.model.w.weight.detach().clone()
    run = idle(adapted, steps)
    run.optimizer = torch.optim.Adam([p.tensor for p in adapted.params()], lr=lr)
    controllers = [spec.build(run) for spec in adapted.methods["default"].controllers]
    for i in range(steps):
        for controller in controllers:
            controller.before_forward(Step(i, steps))
        now = whole(adapted)
        loss = (now - W - target).square().sum()
        loss.backward()
        run.optimizer.param_groups[0]["lr"] = lr * math.prod(c.rate(Step(i, steps)) for c in controllers)
        run.optimizer.step()
        run.optimizer.zero_grad()
        yield i, loss.item(), now.detach()
    for controller in controllers:
        controller.finish()


def jump_at_restart() -> float:
    """How far the function moves at the restart before step 300, over how far the step before moved it."""
    adapted, target = made(), teacher(10, 12, [4.0, 3.0, 2.0, 1.0])
    W = {i: now for i, _, now in train(adapted, target, 303)}
    assert far(W[299], W[0]) > 0.1
    return far(W[301], W[300]) + far(W[300], W[299])  # step 300 itself has rate 0


def test_a_restart_leaves_the_function_as_it_was() -> None:
    adapted = subject("relora", awake=False, dropout=0.0)
    run = Run(adapted, total=6).steps(2)
    before = logits(adapted.model.eval(), batch())
    run.controllers[0].before_forward(Step(2, 6))
    assert far(logits(adapted.model, batch()), before) < 1e-5
    assert jump_at_restart() < 2e-3


def test_mutants_of_the_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(LowRank, "retire", lambda self: None)
        assert jump_at_restart() > 0.1
    with monkeypatch.context() as m:
        absorb = LowRank.absorb_
        m.setattr(LowRank, "absorb_", lambda self, base: (absorb(self, base), setattr(self, "absorbed", 0))[0])
        assert jump_at_restart() > 0.1


def rank_and_loss(adapted: Adapted, target: Tensor, steps: int) -> tuple[int, float]:
    losses = [loss for _, loss, _ in train(adapted, target, steps)]
    (branch,) = adapted.branches()
    return int(torch.linalg.matrix_rank(branch.delta.weight(), rtol=1e-9)), losses[-1]


def test_its_rank_grows_by_r_a_leg_and_it_goes_below_loras_floor() -> None:
    """The planted problem it wins: a full-rank target. With k legs the tail from the k·r-th singular value on is left."""
    target = teacher(10, 12, [6.0, 5.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.8, 0.6, 0.4])
    floor = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.8, 0.6, 0.4]).square().sum().item()
    rank, loss = rank_and_loss(made(), target, 1200)
    assert rank == 8
    assert loss < 0.2 * floor
    _, stuck = rank_and_loss(plain(), target, 1200)
    assert stuck == pytest.approx(floor, rel=1e-3)


def plain() -> Adapted:
    return layer(get_method("lora", r=2, alpha=2.0, sites="w"))


def test_it_loses_on_a_low_rank_target_by_the_steps_that_restarts_cost() -> None:
    target = teacher(10, 12, [4.0, 3.0])
    _, lora = rank_and_loss(plain(), target, 300)
    _, restarted = rank_and_loss(made(period=30, warmup=25), target, 300)
    assert restarted > 3 * lora


def test_the_rate_is_zero_at_a_restart_and_back_after_the_warmup() -> None:
    controller = Restart(10, 4).build(idle(subject("relora", sites="q_proj"), 40))
    rates = []
    for i in range(24):
        controller.before_forward(Step(i, 40))
        rates.append(controller.rate(Step(i, 40)))
    assert rates[:10] == [1.0] * 10
    assert rates[10:16] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[20] == 0.0
    assert rates[24 - 1] == 0.75


@pytest.mark.parametrize(("policy", "least"), [("reset", 1.0), ("magnitude", 0.8), ("random", 0.8), ("keep", 0.0)])
def test_what_the_optimizer_forgets(policy: str, least: float) -> None:
    adapted = subject("relora", awake=False, dropout=0.0, optimizer=policy, unfreeze=("lm_head",))
    run = Run(adapted, total=8).steps(2)
    head = next(p.tensor for p in adapted.params() if p.role == "full")
    others = {k: v.clone() for k, v in run.optimizer.state[head].items()}
    run.controllers[0].before_forward(Step(2, 8))
    for row in adapted.params():
        if row.role not in ("A", "B"):
            continue
        state = run.optimizer.state.get(row.tensor, {})
        assert bool(state) == (policy != "reset")
        for name in ("exp_avg", "exp_avg_sq") if state else ():
            zeros = (state[name] == 0).float().mean().item()
            assert zeros >= least if policy != "keep" else zeros < 0.5
            if policy == "magnitude":  # what is left are the largest
                assert state[name].count_nonzero() > 0
        if state:
            assert state["step"] == 2, "the count stays"
    assert all(same_bits(others[k].reshape(-1), v.reshape(-1)) for k, v in run.optimizer.state[head].items())


def test_a_gradient_reaches_a_fresh_leg_and_legs_differ() -> None:
    """The official code's dead start (A and B both zero) does not happen."""
    run = Run(subject("relora", awake=False, dropout=0.0), total=9).steps(8)
    for branch in run.adapted.branches():
        delta: Any = branch.delta
        assert delta.A.any() and delta.B.any()
        one, two, three = delta.A0.split(4)
        assert far(one, two) > 0.1
        assert far(two, three) > 0.1
        assert delta.absorbed == len(delta.A0) == 12


def test_the_bare_base_is_shown_exactly_and_training_goes_on() -> None:
    run = Run(subject("relora", awake=False, dropout=0.0), total=9)
    adapted = run.adapted
    want = logits(adapted.model.eval(), batch())
    run.steps(5)
    moved = logits(adapted.model.eval(), batch())
    with adapted.disabled():
        assert same_bits(logits(adapted.model, batch()), want)
    assert far(logits(adapted.model, batch()), moved) < 1e-5
    run.steps(2)
    adapted.detach()
    assert same_bits(logits(adapted.model.eval(), batch()), want)


def test_with_and_without_absorbing_it_is_one_trajectory() -> None:
    runs = [
        Run(subject("relora", dtype=torch.float64, awake=False, dropout=0.0, absorb=absorb), total=9).steps(8) for absorb in (True, False)
    ]
    for one, two in zip(*(r.adapted.tensors("default").values() for r in runs), strict=True):
        assert far(one, two) < 1e-9
    assert {b.delta.absorbed for b in runs[1].adapted.branches()} == {0}


def test_a_resume_in_mid_schedule_gives_the_same_bits() -> None:
    straight = Run(subject("relora", awake=False), total=9).steps(7)
    for at in (1, 2, 3, 4):
        state = Run(subject("relora", awake=False), total=9).steps(at).state()
        again = Run(subject("relora", awake=False), total=9).restore(state).steps(7 - at)
        for name, tensor in straight.adapted.tensors("default").items():
            assert same_bits(tensor, again.adapted.tensors("default")[name]), (at, name)


def test_what_a_low_precision_base_loses_is_noted() -> None:
    for dtype, noted in ((torch.float32, False), (torch.bfloat16, True)):
        run = Run(subject("relora", dtype=dtype, awake=False, dropout=0.0), total=5, lr=1e-4).steps(5)
        run.finish()
        assert bool(run.adapted.notes) == noted, run.adapted.notes
        assert {b.delta.absorbed for b in run.adapted.branches()} == {0}


def test_parts_of_a_fused_weight_share_a_base_and_lose_nothing() -> None:
    from lorakit import attach
    from lorakit.data.tiny import tiny_model

    model = tiny_model("gpt2")
    run = Run(attach(model, get_method("relora", r=2, dropout=0.0, period=2, warmup=0, sites="qv")), total=7).steps(7)
    before = logits(model.eval(), batch())
    assert far(logits(run.finish().model, batch()), before) < 1e-5
    assert run.adapted.notes == []


def test_scaled_in_the_middle_all_of_it_is_scaled() -> None:
    run = Run(subject("relora", awake=False, dropout=0.0), total=9)
    adapted = run.adapted
    want = logits(adapted.model.eval(), batch())
    run.steps(5)
    moved = logits(adapted.model.eval(), batch())
    assert far(moved, want) > 1e-3
    adapted.scale("default", 0.0)
    assert same_bits(logits(adapted.model, batch()), want)
    run.controllers[0].before_forward(Step(5, 9))
    assert same_bits(logits(adapted.model, batch()), want), "what is scaled is not absorbed"
    adapted.scale("default", 1.0)
    assert far(logits(adapted.model, batch()), moved) < 1e-5


def test_a_gate_is_forgotten_with_its_pair() -> None:
    run = Run(subject("bilora+relora", awake=False, period=3, warmup=0), total=6).steps(3)
    gates = [p.tensor for p in run.adapted.params() if p.role == "g"]
    assert all(g in run.optimizer.state for g in gates)
    run.controllers[0].before_forward(Step(3, 6))
    assert not any(g in run.optimizer.state for g in gates)


def test_legs_of_other_ranks_are_absorbed_whole() -> None:
    adapted = subject("relora", awake=False, dropout=0.0, sites=["q_proj"])
    for branch in adapted.branches():
        delta: Any = branch.delta
        before = branch.base.dense(torch.float64)
        for r in (4, 6, 3):
            delta.resize(r)
            delta.A.data.normal_()
            delta.B.data.normal_()
            delta.retire()
        delta.A.data.zero_()
        whole = delta.weight().double()
        delta.absorb_(branch.base)
        assert delta.absorbed == 13
        assert far(branch.base.dense(torch.float64) - before, whole) < 1e-5
        branch.expel()


@pytest.mark.parametrize(("name", "says"), [("pissa+relora", "anchor"), ("dfo_lora+relora", "no start of its own")])
def test_what_cannot_be_restarted_is_refused_before_it_runs(name: str, says: str) -> None:
    with pytest.raises(Incompatible, match=says):
        Run(subject(name, awake=False, period=2, warmup=0), total=4)


def test_impossible_schedules_are_refused() -> None:
    for kwargs, says in (({"period": 0}, "period=0"), ({"period": 10, "warmup": 10}, "warm-up of 10"), ({"prune": 1.5}, "prune=1.5")):
        with pytest.raises(BadParameter, match=says):
            relora(**kwargs)  # type: ignore[arg-type]


def test_at_least_the_share_is_pruned() -> None:
    moment = torch.arange(1.0, 8.0)
    kept = module._kept(moment, Restart(10, 1, "magnitude", 0.5), torch.Generator())
    assert kept.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_start_that_is_made_once_cannot_start_every_leg() -> None:
    eva = get_method("relora").but(init=get_method("eva").init)
    adapted = subject("relora")
    adapted.methods["default"] = eva
    with pytest.raises(Incompatible, match="every leg of a restart starts anew"):
        Restart(4, 2).build(idle(adapted, 8))
