"""SoRA's acceptance properties (arXiv:2311.11696)."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorakit
from lorakit import Adapted, BadParameter, attach, get_method
from lorakit.adapters.peft import to_peft
from lorakit.core.events import Step
from lorakit.core.lowrank import LowRank
from lorakit.methods.rank_allocation import sora as module
from lorakit.methods.rank_allocation.sora import ThresholdSpec, soft_threshold
from lorakit.parts.inits.random import Kaiming
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, same_bits, subject
from tests.methods.tools import layer, teacher, whole

XI = 0.3


def gates(adapted: Adapted) -> list[Tensor]:
    found = []
    for branch in adapted.branches():
        assert isinstance(branch.delta, LowRank)
        assert branch.delta.g is not None
        found.append(branch.delta.g.detach())
    return found


def open_gates(adapted: Adapted) -> int:
    return sum(int((g != 0).sum()) for g in gates(adapted))


# --- the proximal step ------------------------------------------------------------------------------------------------------------


def three_lines(x: Tensor, xi: float) -> Tensor:
    """The official operator: one line after the other, in place."""
    x = x.clone()
    x[x > xi] -= xi
    x[x < -xi] += xi
    x[x.abs() < xi] = 0.0
    return x


def is_the_soft_threshold(operator: Any) -> bool:
    """The minimizer of (y − x)² / 2 + ξ|y|, by its subgradient: y − x + ξ sign(y) = 0, or y = 0 and |x| ≤ ξ."""
    x = torch.cat([torch.linspace(-1, 1, 401, dtype=torch.float64), torch.tensor([XI, -XI, 2 * XI, 0.0], dtype=torch.float64)])
    y = operator(x, XI)
    at_zero = (y == 0) & (x.abs() <= XI)
    return bool((at_zero | ((y != 0) & ((y - x + XI * y.sign()).abs() < 1e-12))).all())


def test_the_step_is_a_soft_threshold_in_the_doubtful_range_too() -> None:
    assert is_the_soft_threshold(soft_threshold)
    assert not is_the_soft_threshold(three_lines)
    assert not is_the_soft_threshold(lambda x, xi: torch.where(x.abs() > xi, x, 0.0))  # a hard threshold
    inside = torch.tensor([0.45, -0.45])
    assert soft_threshold(inside, XI).tolist() == pytest.approx([0.15, -0.15])
    assert three_lines(inside, XI).tolist() == [0.0, 0.0]


def steps_to_zero(xi: float, **parts: Any) -> tuple[list[int], list[int]]:
    """For every gate: steps until it is exactly 0 without a loss, and ⌈|g| / ξ⌉."""
    method = get_method("sora", r=4, xi=xi, sites="q_proj").but(**parts)
    run = Run(attach(base(), method), total=200, loss=lambda m, ids: 0.0 * m(input_ids=ids).logits.sum())
    start, seen = torch.cat(gates(run.adapted)), []
    for _ in range(12):
        run.step()
        seen.append(torch.cat(gates(run.adapted)) == 0)
    return (1 + (~torch.stack(seen)).sum(0)).tolist(), torch.ceil(start.abs() / xi).int().tolist()


def test_without_a_loss_every_gate_is_exactly_zero_after_its_size_over_xi_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found, want = steps_to_zero(XI)
    assert found == want
    assert len(set(want)) > 2
    assert steps_to_zero(XI, controllers=())[0] != want
    monkeypatch.setattr(module, "soft_threshold", three_lines)
    assert steps_to_zero(XI)[0] != want


def test_it_follows_the_optimizer_and_leaves_a_and_b_alone() -> None:
    (sparse, plain) = (Run(attach(base(), get_method("sora", r=4, xi=xi)), total=8) for xi in (0.05, 0.0))
    sparse.step(), plain.step()
    for p, q in zip(sparse.adapted.params(), plain.adapted.params(), strict=True):
        want = soft_threshold(q.tensor.detach(), 0.05) if p.role == "g" else q.tensor.detach()
        assert same_bits(p.tensor.detach(), want)


def test_weight_decay_spares_the_gates() -> None:
    adapted = subject("sora")
    built = adapted.methods["default"].optim.build(adapted.params(), lr=1e-3, weight_decay=0.1)
    assert {n.rsplit(".", 1)[-1]: g["weight_decay"] for g in built.param_groups for n in g["names"]} == {"A": 0.1, "B": 0.1, "g": 0.0}


# --- the schedule -----------------------------------------------------------------------------------------------------------------


def test_xi_rises_from_nothing_in_equal_stages() -> None:
    spec = ThresholdSpec(7e-4, 8, False)
    assert [round(spec.at(Step(t, 80)) * 1e4, 6) for t in range(0, 80, 10)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert spec.at(Step(9, 80)) == 0
    assert spec.at(Step(79, 80)) == 7e-4
    assert {ThresholdSpec(3e-4, 1, False).at(Step(t, 10)) for t in range(10)} == {3e-4}


def test_per_rate_takes_the_steps_own_learning_rate() -> None:
    def shrunk(rate: float) -> Tensor:
        run = Run(attach(base(), get_method("sora", r=4, xi=1.0, per_rate=True, sites="q_proj")), total=8, lr=rate)
        run.loss_of = lambda m, ids: 0.0 * m(input_ids=ids).logits.sum()
        before = torch.cat(gates(run.adapted)).abs()
        run.step()
        return before - torch.cat(gates(run.adapted)).abs()

    assert shrunk(1e-2).max().item() == pytest.approx(1e-2, rel=1e-4)
    assert shrunk(1e-3).max().item() == pytest.approx(1e-3, rel=1e-3)


# --- what it finds ----------------------------------------------------------------------------------------------------------------


def trained(xi: float, *, singular: list[float] | None = None, steps: int = 160) -> tuple[int, float]:
    """(open gates, ‖ΔW − ΔW*‖²) on one layer."""
    target = teacher(10, 12, singular or [4.0, 3.0])
    adapted = layer(get_method("sora", r=6, alpha=6.0, xi=xi, sites="w"))
    W = adapted.model.w.weight.detach().clone()
    run = Run(adapted, total=steps, lr=3e-2, clip=1e9, loss=lambda m, _: (whole(adapted) - W - target).square().sum())
    run.steps(steps).finish()
    return open_gates(adapted), (whole(adapted) - W - target).square().sum().item()


def test_a_larger_xi_never_leaves_more_ranks() -> None:
    found = [trained(xi)[0] for xi in (0.0, 0.02, 0.05, 0.2)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 6
    assert found[-1] < 3


def test_a_target_of_rank_two_keeps_few_gates_and_stays_learned() -> None:
    ranks, error = trained(0.03)
    assert 2 <= ranks <= 3
    assert error < 1e-2 * (16 + 9)


def test_a_target_of_full_rank_is_spoiled_by_a_large_xi() -> None:
    """Where it must lose: every rank is needed."""
    full = [4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    assert trained(0.0, singular=full)[1] < 0.05 * 96
    assert trained(0.2, singular=full)[1] > 0.5 * 96


# --- start and export -------------------------------------------------------------------------------------------------------------


def test_it_starts_as_lora_with_gates_from_a_standard_normal() -> None:
    adapted, plain = subject("sora", awake=False), subject("lora", awake=False)
    assert same_bits(logits(adapted.model, batch()), logits(base(), batch()))
    for ours, theirs in zip(adapted.branches(), plain.branches(), strict=True):
        assert same_bits(ours.delta.A.detach(), theirs.delta.A.detach())
    drawn = torch.cat(gates(attach(base(), get_method("sora", r=16, sites="all-linear"))))
    assert drawn.mean().abs() < 0.3
    assert drawn.std().item() == pytest.approx(1.0, rel=0.2)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module.OpenGates, "__call__", lambda self, *rest: Kaiming()(*rest))
        assert not torch.cat(gates(attach(base(), get_method("sora", r=4)))).any(), "a mutant whose gates never open"


def test_zero_gates_are_exact_zeros_in_the_file_and_are_dropped_in_the_export(tmp_path: Path) -> None:
    adapted = Run(subject("sora", xi=0.15), total=8).steps(5).finish()
    live, kept = logits(adapted.model, batch()), open_gates(adapted)
    assert 0 < kept < 4 * len(adapted.branches())
    adapted.save(tmp_path / "own")
    again = lorakit.load(base(), tmp_path / "own")
    assert [int((g == 0).sum()) for g in gates(again)] == [int((g == 0).sum()) for g in gates(adapted)]
    assert same_bits(logits(again.model, batch()), live)
    assert to_peft(adapted.state(), tmp_path / "peft", model=base()).total == 0
    written = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert sum(len(t) for k, t in written.items() if "lora_A" in k) == kept, "law L5 holds its logits against the real PEFT's"
    assert far(logits(adapted.merge(), batch()), live) < 1e-5


@pytest.mark.parametrize("values", [{"xi": -1e-3}, {"stages": 0}])
def test_values_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match="stages="):
        get_method("sora", **values)
