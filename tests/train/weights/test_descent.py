"""The steepest non-negative mixture at the base."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapters.mix import mix
from lorakit.adapters.mix.parts import Sources
from lorakit.core.errors import BadParameter
from lorakit.train.weights import first_order
from lorakit.train.weights.descent import golden, nnls, overlaps
from tests.adapters.subject import tiny_model
from tests.train.weights.world import adapter, counted, dense, distance, layer, predicts, some, toward, update, with_adapter


def test_a_planted_mixture_is_found_on_a_quadratic() -> None:
    """The gradient at the base is −2 ΔW* there, so the direction is exact; one that would have to be subtracted is left out."""
    parts = [update(i) for i in range(4)]
    target = 0.6 * dense(parts[1]) + 0.4 * dense(parts[3])
    found = first_order(layer(), [adapter(f) for f in parts], distance(target), budget=20)
    assert found.weights == pytest.approx([0, 0.6, 0, 0.4], abs=0.01)
    against = first_order(layer(), [adapter(f) for f in parts], distance(-dense(parts[0])))
    assert against.weights[0] == 0 and all(w >= 0 for w in against.weights)


def test_nothing_helps() -> None:
    parts = [update(i) for i in range(2)]
    found = first_order(layer(), [adapter(f) for f in parts], distance(-dense(parts[0]) - dense(parts[1])))
    assert found.weights == [0.0, 0.0] and len(found.tried) == 1 and found.loss == found.base


def test_one_backward_and_the_budget() -> None:
    model, adapters = tiny_model("llama"), some()
    objective, calls = counted(toward(with_adapter(model, mix(adapters, weights=[0.5, 0.5, 0.0]))))
    found = first_order(model, adapters, objective, budget=9)
    assert calls == [True, *[False] * 8] and len(found.tried) == 9
    assert found.loss < 0.5 * found.base
    assert max(max(one.weights[0]) for one in found.tried) <= 1.5


def test_overlaps_are_inner_products_of_updates() -> None:
    adapters = [*some(n=2), *some(n=1, seed=9, sites="attention")]
    K = overlaps(Sources(adapters))
    changes = [{name: d.weight().double() for name, d in one.deltas().items()} for one in adapters]
    wanted = [[sum(float((a[k] * b[k]).sum()) for k in a.keys() & b.keys()) for b in changes] for a in changes]
    assert torch.allclose(K, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5)


def test_overlaps_count_every_expert() -> None:
    adapters = some("mixtral", n=2, r=2, sites="experts")
    changes = [{name: d.weight().double() for name, d in one.deltas().items()} for one in adapters]
    wanted = sum(float((changes[0][k] * changes[1][k]).sum()) for k in changes[0])
    assert overlaps(Sources(adapters))[0, 1].item() == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_non_negative_least_squares(seed: int, n: int) -> None:
    """The conditions of its optimum: d ≥ 0, no gradient where d > 0, none downhill where d = 0."""
    rng = torch.Generator().manual_seed(seed)
    M, b = torch.randn(n + 3, n, generator=rng, dtype=torch.float64), torch.randn(n, generator=rng, dtype=torch.float64)
    d = nnls(M.T @ M, b)
    slope = M.T @ M @ d - b
    assert (d >= 0).all()
    assert slope[d > 0].abs().max().item() < 1e-6 if (d > 0).any() else True
    assert (slope > -1e-6).all()


def test_an_adapter_of_zeros_gets_nothing() -> None:
    zero = update(0)._replace(B=torch.zeros(10, 2))
    found = first_order(layer(), [adapter(zero), adapter(update(1))], distance(dense(update(1))), budget=20)
    assert found.weights == pytest.approx([0, 1], abs=0.01)


@pytest.mark.parametrize("at", [0.0, 0.31, 0.77, 1.0])
def test_golden_section(at: float) -> None:
    seen: list[float] = []
    golden(lambda t: (seen.append(t), (t - at) ** 2)[1], 16)
    assert len(seen) == 16 and all(0 <= t <= 1 for t in seen)
    assert min(abs(t - at) for t in seen) < 2e-3


def test_a_budget_without_room_for_a_line() -> None:
    with pytest.raises(BadParameter, match="nnls: budget=2"):
        first_order(tiny_model("llama"), some(), predicts(), budget=2)
