"""DyLoRA's acceptance properties (arXiv:2210.07558)."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lorakit
from lorakit import Adapted, BadParameter, attach, get_method
from lorakit.adapters.peft import to_peft
from lorakit.methods.rank_allocation import dylora as module
from lorakit.methods.rank_allocation.dylora import DrawSpec, Nested, truncated
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, same_bits, small, subject
from tests.methods.tools import layer, whole

UNIFORM = DrawSpec(1, (1.0,) * 4, False)


def deltas(adapted: Adapted) -> list[Nested]:
    found = [b.delta for b in adapted.branches()]
    assert all(isinstance(d, Nested) for d in found)
    return found  # type: ignore[return-value]


# --- the draw ---------------------------------------------------------------------------------------------------------------------


def test_b_is_a_function_of_seed_and_step_with_the_distribution_asked_for() -> None:
    drawn = [UNIFORM.rank(0, t) for t in range(4000)]
    assert drawn == [UNIFORM.rank(0, t) for t in range(4000)]
    assert drawn != [UNIFORM.rank(1, t) for t in range(4000)]
    assert all(n == pytest.approx(1000, rel=0.15) for n in Counter(drawn).values())
    assert set(drawn) == {1, 2, 3, 4}
    skew = Counter(DrawSpec(3, (1.0, 0.0, 3.0), False).rank(0, t) for t in range(4000))
    assert set(skew) == {3, 5}
    assert skew[5] / skew[3] == pytest.approx(3.0, rel=0.15)


def test_the_methods_distributions() -> None:
    def weights(**kwargs: Any) -> tuple[float, ...]:
        (spec,) = get_method("dylora", r=4, **kwargs).controllers
        assert isinstance(spec, DrawSpec)
        return spec.weights

    assert weights() == (1.0,) * 4
    assert weights(r_min=2) == (1.0,) * 3
    assert weights(distribution="geometric", p=0.5) == (1.0, 0.5, 0.25, 0.125)
    assert weights(weights=(0.0, 1.0, 0.0, 2.0)) == (0.0, 1.0, 0.0, 2.0)


def test_one_b_for_all_sites_whose_forward_is_the_cut_one() -> None:
    """x goes through A[:b], B[:, :b] with alpha / b, in every site, whatever b the step drew."""
    adapted = subject("dylora", dtype=torch.float64)
    run = Run(adapted, total=8)
    seen = []
    for step in range(6):
        run.step()
        gates = torch.stack([d.drawn for d in deltas(adapted)])
        b = int((gates[0] != 0).sum())
        seen.append(b)
        assert torch.equal(gates, gates[:1].expand_as(gates))
        for branch in adapted.branches()[:3]:
            d, x = branch.delta.train(), torch.randn(3, branch.site.d_in, dtype=torch.float64)
            want = x @ ((16.0 / b) * d.B[:, :b] @ d.A[:b]).T
            assert far(d(x, adapted.context).detach(), want.detach()) < 1e-12
        assert b == UNIFORM.rank(adapted.seed, step)
    assert len(set(seen)) > 1


# --- the update -------------------------------------------------------------------------------------------------------------------


def moved_components(frozen: bool, *, steps: int = 12) -> list[tuple[int, set[int], set[int]]]:
    """Of every step: b, and the components of A and of B that changed a bit, under AdamW with weight decay."""
    adapted = subject("dylora", frozen=frozen, r=4, sites="q_proj")
    run = Run(adapted, total=steps, lr=1e-2)
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.1
    out = []
    for _ in range(steps):
        before = [(d.A.detach().clone(), d.B.detach().clone()) for d in deltas(adapted)]
        run.step()
        A, B = (set[int](), set[int]())
        for d, (a, b) in zip(deltas(adapted), before, strict=True):
            A |= {i + 1 for i in range(4) if not torch.equal(d.A[i], a[i])}
            B |= {i + 1 for i in range(4) if not torch.equal(d.B[:, i], b[:, i])}
        out.append((UNIFORM.rank(adapted.seed, run.index - 1), A, B))
    return out


def test_frozen_moves_component_b_alone_and_the_normal_form_those_up_to_b() -> None:
    for frozen in (True, False):
        found = moved_components(frozen)
        assert len({b for b, *_ in found}) > 2
        for b, A, B in found:
            assert A == B == ({b} if frozen else set(range(1, b + 1)))


def test_momentum_and_decay_would_move_what_was_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that masks gradients only."""

    def gradients_only(self: Any, optimizer: Any, moved: Any) -> None:
        for p, mask in moved:
            p.grad.masked_fill_(~mask, 0.0)

    monkeypatch.setattr(module.Partial, "before", gradients_only)
    assert any(set(range(1, b + 1)) != A for b, A, _ in moved_components(False))


def test_the_optimizers_state_of_what_was_not_drawn_stays_too() -> None:
    run = Run(subject("dylora", frozen=True, sites="q_proj"), total=20).steps(6)
    held = {id(p.tensor): {k: v.clone() for k, v in run.optimizer.state[p.tensor].items()} for p in run.adapted.params()}
    run.step()
    b = UNIFORM.rank(run.adapted.seed, 6)
    rest = [i for i in range(4) if i != b - 1]
    for p in run.adapted.params():
        for key in ("exp_avg", "exp_avg_sq"):
            now, before = run.optimizer.state[p.tensor][key], held[id(p.tensor)][key]
            assert same_bits(*(t.movedim(0 if p.role == "A" else 1, 0)[rest] for t in (now, before)))


# --- cutting ----------------------------------------------------------------------------------------------------------------------


def test_cutting_at_b_equals_running_with_b(tmp_path: Path) -> None:
    adapted = Run(subject("dylora"), total=8).steps(3).finish()
    state = adapted.state()
    for b in (1, 2, 3, 4):
        cut = attach(base(), get_method("lora"), name="x").add("y", truncated(state, b)).switch("y")
        model = adapted.model.train()
        for d in deltas(adapted):
            d.drawn.copy_(d.gate(b))
        with torch.no_grad(), adapted.given(step=0):
            running = model(input_ids=batch()).logits
        assert far(logits(cut.model.eval(), batch()), running) < 1e-6
        found = to_peft(truncated(state, b), tmp_path / str(b), model=base())
        assert found.total == 0
        assert {f.A.shape[0] for f in truncated(state, b).factors().values()} == {b}
        merged = logits(cut.merge(), batch())
        assert far(merged, running) < 1e-5
    assert set(truncated(state, 2).tensors) == set(state.tensors), "nothing is lost by a cut"


def test_evaluation_is_at_the_rank_asked_for_whatever_was_drawn() -> None:
    adapted = subject("dylora", eval_r=2)
    want = logits(adapted.model.eval(), batch())
    run = Run(adapted, total=8)
    for b in (1, 3, 4):
        for d in deltas(adapted):
            d.drawn.copy_(d.gate(b))
        assert same_bits(logits(adapted.model.eval(), batch()), want)
    assert {f.A.shape[0] for f in adapted.state().factors().values()} == {2}
    other = subject("dylora", eval_r=4)
    assert not torch.equal(logits(other.model, batch()), want)
    assert all(torch.equal(d.kept != 0, torch.tensor([True, True, False, False])) for d in deltas(run.adapted))


SIGMA = (4.0, 3.0, 2.0, 1.0)


def errors(method: str, *, steps: int, **kwargs: Any) -> list[float]:
    """‖ΔW cut at b − diag(4, 3, 2, 1)‖ over the best of rank b, for b = 1, 2, 3; and ‖·‖ / ‖target‖ at b = 4, whose best is 0."""
    target = torch.diag(torch.tensor(SIGMA, dtype=torch.float64))
    adapted = layer(get_method(method, r=4, alpha=4.0, sites="w", **kwargs), d_in=4, d_out=4)
    W = adapted.model.w.weight.detach().clone()
    run = Run(adapted, total=steps, lr=2e-2, clip=1e9, loss=lambda m, _: (whole(adapted) - W - target).square().sum())
    for i in range(steps):
        for group in run.optimizer.param_groups:
            group["initial_lr"] = 2e-2 * (1 - i / steps)
        run.step()
    delta = adapted.branches()[0].delta
    scale = [4.0 / b if kwargs.get("scale") == "b" else 1.0 for b in range(1, 5)]
    cuts = [float((s * delta.B[:, :b] @ delta.A[:b] - target).detach().norm()) for b, s in enumerate(scale, 1)]
    best = [sum(x * x for x in SIGMA[b:]) ** 0.5 for b in (1, 2, 3)]
    return [c / b for c, b in zip(cuts, best, strict=False)] + [cuts[3] / target.norm().item()]


@pytest.mark.parametrize("frozen", [False, True])
def test_every_cut_is_within_a_tenth_of_the_best_of_its_rank(frozen: bool) -> None:
    found = errors("dylora", steps=900, scale="r", frozen=frozen)
    assert max(found[:3]) < 1.1, found
    assert found[3] < 0.1


def test_a_plain_lora_cut_short_is_not() -> None:
    found = errors("lora", steps=400)
    assert found[3] < 0.02
    assert all(e > 1.1 for e in found[:3]), found


def greedy() -> list[float]:
    """What frozen steps converge to under alpha / b, by hand: the earlier components shrink with b, and component b takes the largest
    entry of what is left."""
    components: list[Tensor] = []
    out = []
    for b in range(1, 5):
        rest = torch.tensor(SIGMA, dtype=torch.float64) - sum(components, torch.zeros(4, dtype=torch.float64)) / b
        largest = torch.where(torch.arange(4) == rest.argmax(), rest, 0.0)
        components.append(b * largest)
        out.append((rest - largest).norm().item())
    return out


def test_alpha_over_b_cannot_reach_every_best_on_a_plain_matrix() -> None:
    """Where it must lose, as the docstring says: component 1 would have to be b σ₁ / alpha at every b at once."""
    best = [sum(x * x for x in SIGMA[b:]) ** 0.5 for b in (1, 2, 3)] + [sum(x * x for x in SIGMA) ** 0.5]
    want = [g / b for g, b in zip(greedy(), best, strict=True)]
    assert min(want[1:3]) > 1.3
    assert errors("dylora", steps=900, scale="b", frozen=True) == pytest.approx(want, rel=0.03)


# --- no recompilation, and what is refused ----------------------------------------------------------------------------------------


def test_another_b_compiles_nothing_anew() -> None:
    adapted = subject("dylora", sites="layers.0.mlp.up_proj")
    module_ = adapted.branches()[0].host.module.train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module_, backend=counter, fullgraph=True)
    outs: list[Tensor] = []
    for b in (1, 2, 3, 4, 1):
        for d in deltas(adapted):
            d.drawn.copy_(d.gate(b))
        with adapted.given(step=b):
            outs.append(compiled(torch.ones(3, 32)).detach())
            assert far(outs[-1], module_(torch.ones(3, 32)).detach()) < 1e-6
    assert counter.frame_count == 1
    assert not torch.equal(outs[0], outs[1])
    assert same_bits(outs[0], outs[4])


def test_a_saved_adapter_remembers_where_it_is_cut(tmp_path: Path) -> None:
    adapted = subject("dylora", eval_r=2)
    lorakit.adapters.io.save_adapter(truncated(adapted.state(), 3), tmp_path)
    again = lorakit.load(base(), tmp_path)
    assert {f.A.shape[0] for f in again.state().factors().values()} == {3}
    assert all(same_bits(v, adapted.tensors("default")[k]) for k, v in again.tensors("default").items())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"eval_r": 9}, "eval_r=9"),
        ({"r_min": 3, "eval_r": 2}, "r_min=3"),
        ({"r_min": 0}, "r_min=0"),
        ({"distribution": "geometric", "p": 1.0}, "p=1.0"),
        ({"weights": (1.0, 2.0)}, "must be 8 numbers"),
        ({"weights": (0.0,) * 8}, "not all 0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        get_method("dylora", **values)


def test_a_rank_over_the_matrix_is_refused() -> None:
    with pytest.raises(BadParameter, match="exceeds the matrix"):
        attach(base(), small("dylora", r=64))
