"""AdaLoRA's acceptance properties (arXiv:2303.10512)."""

import re

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, Adapter, BadParameter, attach, get_method
from lorakit.core.events import Step
from lorakit.core.method import Recipe
from lorakit.methods.rank_allocation.adalora import Budget, BudgetSpec, Orthogonal
from tests.laws.steps import Run, idle
from tests.laws.subject import base, batch, far, logits, same_bits, subject
from tests.methods.tools import layer, normal, teacher

T = 20
SCHEDULE = {"r": 4, "target_r": 2, "tinit": 3, "tfinal": 5, "delta_t": 1}


def run_of(**changes: int) -> Run:
    return Run(subject("adalora", awake=False, **(SCHEDULE | changes)), total=T, lr=2e-2)


def alive(adapted: Adapted) -> list[int]:
    """Nonzero entries of g by site."""
    return [int(b.delta.g.count_nonzero()) for b in adapted.branches()]


def cubic(t: int, b0: int, bT: int, tinit: int, tfinal: int) -> int:
    """b(t) as the paper has it."""
    if t <= tinit:
        return b0
    if t >= T - tfinal:
        return bT
    return int(bT + (b0 - bT) * (1 - (t - tinit) / (T - tinit - tfinal)) ** 3)


# --- the budget -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tinit", [0, 3])
@pytest.mark.parametrize("tfinal", [0, 5])
@pytest.mark.parametrize("delta_t", [1, 3, 7])
def test_the_budget_follows_the_cubic_and_ends_exactly_at_its_target(delta_t: int, tfinal: int, tinit: int) -> None:
    run = run_of(delta_t=delta_t, tfinal=tfinal, tinit=tinit)
    n, masked = len(run.adapted.branches()), 0
    for t in range(T):
        run.step()
        if t > tinit and (t % delta_t == 0 or t >= T - tfinal):
            assert sum(alive(run.adapted)) == cubic(t, 4 * n, 2 * n, tinit, tfinal), t
            masked += 1
        elif t <= tinit:
            assert sum(alive(run.adapted)) == 4 * n, "nothing is pruned before t_i"
    assert masked >= T // delta_t - tinit - 1
    run.finish()
    assert sum(alive(run.adapted)) == 2 * n
    assert len(set(alive(run.adapted))) > 1, "and not the same at every site"


def test_a_pruned_triplet_grows_again_between_maskings_and_not_in_the_last_phase() -> None:
    run = run_of(delta_t=4)
    n, counts = len(run.adapted.branches()), []
    kept: list[list[Tensor]] = []
    for t in range(T):
        run.step()
        counts.append(sum(alive(run.adapted)))
        if t >= T - 5:
            kept.append([b.delta.g.detach() != 0 for b in run.adapted.branches()])
    assert counts[8] < counts[9] == 4 * n
    assert counts[-5:] == [2 * n] * 5
    assert all(torch.equal(a, b) for masks in kept for a, b in zip(masks, kept[0], strict=True)), "one mask"
    before = run.adapted.tensors("default")
    copies = {k: v.clone() for k, v in before.items()}
    run.finish()
    assert all(same_bits(v, copies[k]) for k, v in run.adapted.tensors("default").items()), "what was trained is what is saved"


def test_a_run_that_ends_early_ends_at_the_target_too() -> None:
    run = run_of()
    run.steps(T // 2).finish()
    assert sum(alive(run.adapted)) == 2 * len(run.adapted.branches())


def test_the_scale_never_changes() -> None:
    run = run_of()
    run.steps(T).finish()
    assert {b.delta.s for b in run.adapted.branches()} == {32 / (4 + 1e-5)}
    assert min(alive(run.adapted)) < 4


def test_ties_keep_exactly_the_budget() -> None:
    adapted = subject("adalora", sites=["qv"], **SCHEDULE)
    budget = BudgetSpec(4, 2, 0, 0, 1, 0.85, 0.85).build(idle(adapted, T))
    budget.finish()  # no scores at all yet
    assert sum(alive(adapted)) == 2 * 4


# --- the scores -----------------------------------------------------------------------------------------------------------------


def test_scores_on_two_by_two_for_two_steps_in_closed_form() -> None:
    """I = |w ∂w|; Ī, Ū smoothed with the new Ī; S = s(g) + mean s(A's row) + mean s(B's column)."""
    adapted = layer(get_method("adalora", r=2, target_r=1, sites="w"), d_in=2, d_out=2)
    (branch,) = adapted.branches()
    delta, b1, b2 = branch.delta, 0.85, 0.6
    budget = BudgetSpec(2, 1, 5, 0, 1, b1, b2).build(idle(adapted, 100))
    values = {
        "A": [[[1.0, 2.0], [3.0, 4.0]], [[1.5, 2.5], [2.0, -1.0]]],
        "B": [[[0.5, -1.0], [1.0, 2.0]], [[1.0, 1.0], [0.0, 3.0]]],
        "g": [[0.0, 2.0], [1.0, -2.0]],
    }
    grads = {
        "A": [[[0.1, -0.2], [0.3, 0.1]], [[0.2, 0.2], [-0.1, 0.4]]],
        "B": [[[1.0, 0.5], [-0.5, 0.1]], [[0.1, 0.2], [0.3, 0.4]]],
        "g": [[3.0, 1.0], [0.5, 0.5]],
    }
    for t in range(2):
        for name in values:
            parameter = getattr(delta, name)
            parameter.data = torch.tensor(values[name][t], dtype=torch.float64)
            parameter.grad = torch.tensor(grads[name][t], dtype=torch.float64)
        budget.after_step(Step(t, 100))

    def s(name: str, *at: int) -> float:
        mean = spread = 0.0
        for t in range(2):
            w, d = (torch.tensor(x[name][t], dtype=torch.float64)[at].item() for x in (values, grads))
            now = abs(w * d)
            mean = b1 * mean + (1 - b1) * now
            spread = b2 * spread + (1 - b2) * abs(now - mean)
        return mean * spread

    want = [s("g", i) + (s("A", i, 0) + s("A", i, 1)) / 2 + (s("B", 0, i) + s("B", 1, i)) / 2 for i in range(2)]
    (found,) = budget.scores()
    assert found.tolist() == pytest.approx(want, rel=1e-12)
    # the first triplet's gate by hand: I = 0, then 0.5; Ī = 0.075; Ū = 0.4 · 0.425
    assert s("g", 0) == pytest.approx(0.075 * 0.17)


def test_scores_see_unclipped_gradients_and_freeze_in_the_last_phase() -> None:
    def after(clip: float, index: int) -> Tensor:
        adapted = subject("adalora", sites="q_proj", **SCHEDULE)
        (controller,) = (c.build(idle(adapted, T)) for c in adapted.methods["default"].controllers)
        for p in adapted.params():
            p.tensor.grad = clip * torch.ones_like(p.tensor)
        controller.after_step(Step(index, T, clip))
        return torch.cat(controller.scores())

    assert far(after(0.25, 1), after(1.0, 1)) < 1e-6
    assert after(1.0, T - 6).abs().max() > 0
    assert not after(1.0, T - 5).any()


def test_a_useless_module_loses_its_whole_budget_to_a_useful_one() -> None:
    """y depends on the first layer's input only: the other site sees noise times nothing."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.useful, self.useless = nn.Linear(12, 10, bias=False), nn.Linear(12, 10, bias=False)
            self.useful.weight.data, self.useless.weight.data = normal(10, 12), normal(10, 12, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.useful(x[..., :12]) + 0.0 * self.useless(x[..., 12:])

    target = teacher(10, 12, [4.0, 3.0, 2.0, 1.0])
    model = Two()
    W = model.useful.weight.detach().clone()
    adapted = attach(model, get_method("adalora", r=4, target_r=2, tinit=20, tfinal=40, delta_t=5, orth=0.1))
    eye = torch.cat([torch.eye(12, dtype=torch.float64), normal(12, 12, seed=5)], dim=1)
    run = Run(adapted, total=200, lr=3e-2, data=lambda i: eye, loss=lambda m, x: (m(x).T - W - target).square().sum())
    first = run.step().item()
    run.steps(199).finish()
    assert alive(adapted) == [4, 0]
    assert (model(eye).T - W - target).square().sum().item() < 0.05 * first


# --- the penalty and the adapter --------------------------------------------------------------------------------------------------


def test_the_penalty_is_the_mean_unsquared_distance_from_orthonormal() -> None:
    adapted = subject("adalora", dtype=torch.float64, sites="qv")
    terms = []
    for branch in adapted.branches():
        A, B, eye = branch.delta.A, branch.delta.B, torch.eye(4, dtype=torch.float64)
        terms += [(A @ A.T - eye).square().sum().sqrt(), (B.T @ B - eye).square().sum().sqrt()]
    penalty = Orthogonal(0.3)(adapted, adapted.context)
    assert penalty.item() == pytest.approx(0.3 * sum(t.item() for t in terms) / len(terms))
    tensors = [p.tensor for p in adapted.params() if p.role in "AB"]
    for g, w in zip(torch.autograd.grad(penalty, tensors), torch.autograd.grad(0.3 * sum(terms) / len(terms), tensors), strict=True):
        assert far(g, w) < 1e-10
    with torch.no_grad():
        for branch in adapted.branches():
            nn.init.orthogonal_(branch.delta.A), nn.init.orthogonal_(branch.delta.B)
    rest = Orthogonal(0.3)(adapted, adapted.context)
    assert rest.item() < 1e-12
    assert all(g.isfinite().all() for g in torch.autograd.grad(rest, tensors))


def test_the_start_is_the_base_and_trains_e_from_zero() -> None:
    adapted = subject("adalora", awake=False)
    assert same_bits(logits(adapted.model, batch()), logits(base(), batch()))
    assert all(not b.delta.g.any() and b.delta.A.any() and b.delta.B.any() for b in adapted.branches())
    assert adapted.params().numel() == sum(4 * (b.site.d_in + b.site.d_out + 1) for b in adapted.branches())


def test_the_exported_lora_reproduces_the_logits_with_the_kept_triplets_only() -> None:
    run = run_of()
    adapted = run.steps(T).finish()
    tensors, ranks, sites = {}, {}, []
    for branch in adapted.branches():
        d = branch.delta
        kept = d.g.detach() != 0
        if kept.any():
            sites.append(branch.site)
            ranks["^" + re.escape(branch.site.name)] = int(kept.sum())
            tensors[f"{branch.site.name}.A"] = (d.g[:, None] * d.A).detach()[kept]
            tensors[f"{branch.site.name}.B"] = d.s * d.B.detach()[:, kept]
    kwargs = {"r": 4, "alpha": 4.0, "rank_pattern": ranks, "alpha_pattern": {k: float(r) for k, r in ranks.items()}}
    exported = Adapter(Recipe("lora", kwargs), tuple(sites), tensors)
    fresh = attach(base(), get_method("lora"), name="x").add("y", exported)
    live = logits(adapted.model, batch())
    assert far(logits(fresh.model, batch()), live) < 1e-6
    assert far(live, logits(base(), batch())) > 1e-3
    assert sum(ranks.values()) == 2 * len(adapted.branches())


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"r": 4, "target_r": 5}, "target_r=5"),
        ({"r": 4, "target_r": 0}, "target_r=0"),
        ({"delta_t": 0}, "delta_t=0"),
        ({"tinit": -1}, "tinit=-1"),
    ],
)
def test_schedules_that_cannot_be(kwargs: dict[str, int], says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        get_method("adalora", **kwargs)


def test_a_run_too_short_for_its_schedule_is_refused() -> None:
    adapted = subject("adalora", tinit=10, tfinal=10)
    (spec,) = adapted.methods["default"].controllers
    with pytest.raises(BadParameter, match="leave no step of this run's 20"):
        spec.build(idle(adapted, 20))
    assert isinstance(spec.build(idle(adapted, 21)), Budget)
