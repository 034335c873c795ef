"""Flora's optimizer: its arithmetic step by step, its state, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as Theirs

from lorakit import BadParameter
from lorakit.parts.optimizers import flora as part
from lorakit.parts.optimizers.flora import Adafactor, Flora, FloraOptimizer, Plain
from lorakit.parts.optimizers.projection import Projections, down, up
from lorakit.train.memory import estimate
from tests.laws.steps import Run
from tests.laws.subject import batch, far, subject
from tests.methods.tools import normal


def grads(shape: tuple[int, ...], n: int, *, seed: int = 5) -> list[Tensor]:
    return [normal(*shape, seed=seed + i) for i in range(n)]


def after(spec: Flora, start: Tensor, given: list[Tensor], *, lr: float = 0.1, weight_decay: float = 0.0) -> tuple[Tensor, FloraOptimizer]:
    """The parameter after one step on each gradient, and the optimizer."""
    p = nn.Parameter(start.clone())
    optimizer = FloraOptimizer([{"params": [p]}], spec, lr=lr, weight_decay=weight_decay)
    for g in given:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (6,), (2, 3, 4)])
def test_without_momentum_it_is_transformers_adafactor(shape: tuple[int, ...], scale_parameter: bool, weight_decay: float) -> None:
    start, given = normal(*shape), grads(shape, 50)
    theirs = nn.Parameter(start.clone())
    optimizer = Theirs([theirs], lr=0.1, relative_step=False, scale_parameter=scale_parameter, weight_decay=weight_decay)
    for g in given:
        theirs.grad = g.clone()
        optimizer.step()
    spec = Flora(r=2, beta1=0.0, base=Adafactor(scale_parameter=scale_parameter))
    assert far(after(spec, start, given, weight_decay=weight_decay)[0], theirs.detach()) < 1e-12
    other = Flora(r=2, beta1=0.0, base=Adafactor(scale_parameter=scale_parameter, decay=-0.79))
    assert far(after(other, start, given, weight_decay=weight_decay)[0], theirs.detach()) > 1e-6


def by_hand(given: list[Tensor], spec: Flora, *, lr: float, moves: bool = True, old_first: bool = True) -> Tensor:
    """The change of a weight under the plain rule, written out. `moves`: m is moved over to a new projection; mutants do other things."""
    shape, beta, made = given[0].shape, spec.beta1, Projections(spec.r, spec.seed, "momentum")
    P, change = made.of(0, given[0]), torch.zeros_like(given[0])
    m = torch.zeros_like(down(given[0], P))
    for n, g in enumerate(given, 1):
        change -= lr * ((1 - beta) * g + beta * up(m, P, shape))
        if n % spec.kappa == 0:
            new = made.of(n // spec.kappa, g)
            m, P = (down(up(m, P, shape), new) if moves else m), new
        m = beta * m + (1 - beta) * down(g, P)
    return change if old_first else change - lr * (1 - beta) * up(m, P, shape)


@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
def test_compressed_momentum_moves_over_at_every_new_projection(shape: tuple[int, int]) -> None:
    spec, given = Flora(r=4, beta1=0.5, kappa=3, base=Plain()), grads(shape, 8)
    found, optimizer = after(spec, torch.zeros(shape, dtype=torch.float64), given)
    assert far(found, by_hand(given, spec, lr=0.1)) < 1e-12
    assert far(found, by_hand(given, spec, lr=0.1, moves=False)) > 1e-2
    assert far(found, by_hand(given, spec, lr=0.1, old_first=False)) > 1e-2
    (state,) = optimizer.state.values()
    assert sorted(state) == ["m", "step"]


def test_moving_over_is_continuous_up_to_the_error_of_compression() -> None:
    """On average over seeds the momentum after a boundary is the momentum that one projection would have."""
    given = grads((9, 12), 3)
    spec = {"beta1": 0.5, "base": Plain()}
    zero = torch.zeros(9, 12, dtype=torch.float64)
    exact = after(Flora(r=9, **spec), zero, given)[0]  # r = d: not compressed
    total = torch.zeros_like(exact)
    for seed in range(400):
        total += after(Flora(r=4, kappa=2, seed=seed, **spec), zero, given)[0]
    assert far(total / 400, exact) < 0.15


def test_small_long_and_thin_tensors_keep_their_momentum_whole() -> None:
    spec = Flora(r=4, beta1=0.9, base=Plain())
    for shape in ((4, 12), (12, 4), (8, 33), (12,), (5, 6, 7)):
        given = grads(shape, 4)
        m, want = torch.zeros_like(given[0]), torch.zeros_like(given[0])
        for g in given:
            m = 0.9 * m + 0.1 * g
            want -= 0.1 * m
        assert far(after(spec, torch.zeros_like(want), given)[0], want) < 1e-12
        assert not spec.compresses(torch.Size(shape))
    assert all(spec.compresses(torch.Size(shape)) for shape in ((5, 12), (12, 5), (8, 32)))


@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
def test_its_state_is_r_times_the_larger_dimension_plus_a_row_and_a_column(shape: tuple[int, int]) -> None:
    _, optimizer = after(Flora(r=4), normal(*shape), grads(shape, 2))
    (state,) = optimizer.state.values()
    values = sum(v.numel() for k, v in state.items() if k != "step")
    assert values == 4 * 12 + 9 + 12
    assert values < 9 * 12, "AdamW keeps twice that"


def test_its_state_goes_round_and_projections_are_not_part_of_it() -> None:
    spec, given = Flora(r=4, beta1=0.5, kappa=2), grads((9, 12), 5)
    whole, _ = after(spec, normal(9, 12), given)
    half, optimizer = after(spec, normal(9, 12), given[:3])
    p = nn.Parameter(half.clone())
    resumed = FloraOptimizer([{"params": [p]}], spec, lr=0.1, weight_decay=0.0)
    saved = optimizer.state_dict()
    assert {k for s in saved["state"].values() for k in s} == {"step", "m", "row", "column"}
    resumed.load_state_dict(saved)
    for g in given[3:]:
        p.grad = g.clone()
        resumed.step()
    assert torch.equal(p.detach(), whole)


def test_the_memory_estimate_is_what_a_run_keeps() -> None:
    steps = Run(subject("flora_gc"), total=8).steps(1)
    kept = sum(v.numel() * v.element_size() for state in steps.optimizer.state.values() for v in state.values())
    ids = {"input_ids": batch(), "labels": batch()}
    found = estimate(subject("flora_gc").model, ids, optimizer=Flora(r=4).rule)
    assert found.optimizer == kept
    assert estimate(subject("flora_gc").model, ids, optimizer=Flora(r=8).rule).optimizer > kept


class Row:
    """A row of a table."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.name, self.tensor = "w", nn.Parameter(torch.zeros(shape))


def size_of_momentum(kappa: int, steps: int = 120) -> float:
    spec = Flora(r=4, beta1=0.9, kappa=kappa, base=Plain())
    _, optimizer = after(spec, torch.zeros(64, 64, dtype=torch.float64), [normal(64, 64, seed=i) for i in range(steps)])
    (state,) = optimizer.state.values()
    return float(state["m"].norm())


def test_a_kappa_under_which_the_momentum_would_grow_is_refused() -> None:
    """β^2κ · d / r < 1: 14 steps for β = 0.9, d / r = 16."""
    build: Any = lambda kappa: Flora(r=4, kappa=kappa).build([Row((64, 64))], lr=0.1)  # type: ignore[arg-type]  # noqa: E731
    with pytest.raises(BadParameter, match="use kappa >= 14"):
        build(13)
    build(14)
    Flora(r=4, kappa=1, beta1=0.0).build([Row((64, 64))], lr=0.1)  # type: ignore[list-item, arg-type]
    Flora(r=4, kappa=1).build([Row((4, 64))], lr=0.1)  # type: ignore[list-item, arg-type]
    assert size_of_momentum(7) > 100 * size_of_momentum(1000)
    assert size_of_momentum(20) < 3 * size_of_momentum(1000)


@pytest.mark.parametrize("values", [{"r": 0}, {"kappa": 0}, {"beta1": 1.0}, {"beta1": -0.1}])
def test_values_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match="at least 1, beta1"):
        Flora(**values)


def test_a_closure_is_refused() -> None:
    _, optimizer = after(Flora(), normal(3, 4), [])
    with pytest.raises(BadParameter, match="closure"):
        optimizer.step(lambda: 0.0)


def test_steps_are_bounded_and_relative_to_the_weight() -> None:
    """Adafactor's: rms(step) ≤ lr · max(1e-3, rms(W))."""
    for start, size in ((10 * torch.ones(5, 7), 10.0), (torch.zeros(5, 7), 1e-3)):
        for g in (1e-6 * normal(5, 7, dtype=torch.float32), 1e6 * normal(5, 7, dtype=torch.float32)):
            moved = after(Flora(beta1=0.0), start, [g])[0] - start
            assert part._rms(moved) <= 0.1 * size * 1.001
