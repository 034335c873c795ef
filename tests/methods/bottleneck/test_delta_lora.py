"""Delta-LoRA's acceptance properties (arXiv:2309.02411)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorakit import Adapted, get_method
from lorakit.core.errors import BadParameter
from lorakit.core.events import Step
from lorakit.methods.bottleneck import delta_lora as module
from tests.laws.steps import Run, idle
from tests.laws.subject import far, same_bits, subject
from tests.methods.tools import layer, normal, teacher, whole

K, LAM, S = 20, 2.0, 2.0


def train(adapted: Adapted, target: Callable[[int], Tensor], steps: int, *, lr: float = 5e-3, decay: float = 0.0) -> list[float]:
    """Adam on ‖W' − W − target(t)‖²; the losses."""
    W = adapted.model.w.weight.detach().clone()
    optimizer = torch.optim.AdamW([p.tensor for p in adapted.params()], lr=lr, weight_decay=decay)
    controllers = [spec.build(idle(adapted, steps)) for spec in adapted.methods["default"].controllers]
    losses = []
    for i in range(steps):
        for controller in controllers:
            controller.before_forward(Step(i, steps))
        loss = (whole(adapted) - W - target(i)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def moved(target: Callable[[int], Tensor], steps: int, *, decay: float) -> tuple[Tensor, Tensor]:
    """The paper's own way: a dense W that is moved after every step by the difference of B A. Returns (W moved − W at the start, ΔW)."""
    twin = layer(get_method("lora", r=2, alpha=2 * S, sites="w"))
    (branch,) = twin.branches()
    A, B = branch.delta.A.detach().clone().requires_grad_(True), branch.delta.B.detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([A, B], lr=5e-3, weight_decay=decay)
    W = torch.zeros_like(target(0))
    for t in range(steps):
        before = (B @ A).detach()
        (W + S * B @ A - target(t)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if t >= K:
            W += LAM * S * ((B @ A).detach() - before)
    return W, W + S * (B @ A).detach()


def differences(decay: float = 0.01) -> float:
    """Telescoped against incremental after 1,000 steps on a target that never lets Adam come to rest, where it would amplify rounding."""

    def target(t: int) -> Tensor:
        return teacher(10, 12, [4.0, 3.0, 2.0, 1.0]) + normal(10, 12, seed=t)

    adapted = layer(get_method("delta_lora", r=2, alpha=2 * S, ratio=LAM, start=K, sites="w"))
    train(adapted, target, 1000, decay=decay)
    (branch,) = adapted.branches()
    return far(branch.delta.weight().detach(), moved(target, 1000, decay=decay)[1])


def test_telescoped_equals_incremental_after_1000_steps() -> None:
    assert differences() < 1e-9


def test_mutant_the_whole_delta_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_slowed", lambda w, lam: w)
    assert differences() > 1e-5


def test_mutant_the_snapshot_is_taken_a_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    before = module._CoUpdate.before_forward
    monkeypatch.setattr(module._CoUpdate, "before_forward", lambda self, step: before(self, Step(step.index - 1, step.total)))
    assert differences() > 1e-5


def test_until_k_it_is_lora_and_with_ratio_zero_always() -> None:
    target = teacher(10, 12, [4.0, 3.0, 2.0])
    lora = layer(get_method("lora", r=2, alpha=4.0, sites="w"))
    train(lora, lambda _: target, 40)
    for ratio, start in ((2.0, 40), (2.0, 500), (0.0, 3)):
        ours = layer(get_method("delta_lora", r=2, alpha=4.0, ratio=ratio, start=start, sites="w"))
        train(ours, lambda _: target, 40)
        assert far(whole(ours), whole(lora)) < 1e-13
    late = layer(get_method("delta_lora", r=2, alpha=4.0, ratio=2.0, start=39, sites="w"))
    train(late, lambda _: target, 40)
    assert far(whole(late), whole(lora)) > 1e-6


def test_it_keeps_the_snapshot_and_nothing_dense() -> None:
    adapted = subject("delta_lora", sites=["q_proj"])
    for branch in adapted.branches():
        names = {k: v.numel() for k, v in branch.delta.state_dict().items()}
        pair = 4 * (branch.site.d_in + branch.site.d_out)
        assert sum(names.values()) == 2 * pair + 1
        assert max(names.values()) < branch.site.d_in * branch.site.d_out


def test_rank_is_2r_at_most_whatever_the_number_of_steps() -> None:
    adapted = layer(get_method("delta_lora", r=2, start=10, sites="w"))
    train(adapted, lambda t: normal(10, 12, seed=t % 7), 120)
    (branch,) = adapted.branches()
    assert int(torch.linalg.matrix_rank(branch.delta.weight())) == 4 == branch.delta.bound()
    f = branch.delta.factors()
    assert f.A.shape == (4, 12)
    assert far(f.s * f.B @ f.A, branch.delta.weight()) < 1e-14


def test_the_base_is_never_touched_and_dropout_is_no_parameter() -> None:
    adapted = subject("delta_lora", awake=False, start=1)
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if ".lora." not in n}
    Run(adapted, total=6).steps(4)
    after = dict(adapted.model.named_parameters())
    assert all(same_bits(before[n], after[n]) for n in before)
    with pytest.raises(BadParameter, match="no parameter 'dropout'"):
        get_method("delta_lora", dropout=0.1)
    with pytest.raises(BadParameter, match="start=-1"):
        get_method("delta_lora", start=-1)


def test_a_run_resumes_across_the_snapshot() -> None:
    """Saved before and after step K: the same bits as uninterrupted."""
    straight = Run(subject("delta_lora", awake=False, start=3), total=6).steps(6)
    for at in (2, 3, 4):
        saved = Run(subject("delta_lora", awake=False, start=3), total=6).steps(at).state()
        resumed = Run(subject("delta_lora", awake=False, start=3), total=6).restore(saved).steps(6 - at)
        for name, tensor in straight.adapted.tensors("default").items():
            assert same_bits(tensor, resumed.adapted.tensors("default")[name]), (at, name)


def test_it_wins_where_the_target_leaves_what_was_learned_behind() -> None:
    """Learned T₁ by step K, then asked for C − λ T₁ of rank 2r: (1 + λ) B A = C reaches it, LoRA of rank r cannot."""
    first, second = teacher(10, 12, [3.0, 2.0], seed=1), teacher(10, 12, [3.0, 2.0], seed=5)
    start = 600

    def target(t: int) -> Tensor:
        return first if t < start else second - LAM * first

    ours = layer(get_method("delta_lora", r=2, alpha=4.0, ratio=LAM, start=start, sites="w"))
    lora = layer(get_method("lora", r=2, alpha=4.0, sites="w"))
    floor = torch.linalg.svdvals(target(start))[2:].square().sum().item()
    assert train(ours, target, 2400)[-1] < 1e-2 * floor
    assert train(lora, target, 2400)[-1] > 0.99 * floor


def test_it_loses_where_the_snapshot_is_taken_too_early() -> None:
    """On a target of rank r that stands still, the half-learned product stays in W for good: LoRA fits it, this does not."""
    target = teacher(10, 12, [4.0, 3.0])
    ours = layer(get_method("delta_lora", r=2, alpha=4.0, ratio=LAM, start=50, sites="w"))
    assert train(ours, lambda _: target, 1500)[-1] > 1e-3
    lora = layer(get_method("lora", r=2, alpha=4.0, sites="w"))
    assert train(lora, lambda _: target, 1500)[-1] < 1e-8
