"""LoRAHub's acceptance properties (arXiv:2307.13269)."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.adapters.mix import mix
from lorakit.core.errors import BadParameter, DataError, MissingExtra
from lorakit.train.weights import lorahub
from lorakit.train.weights.search import Boxed, reflected
from tests.adapters.subject import logits, tiny_model
from tests.train.weights.world import (
    adapter,
    bits,
    close,
    counted,
    dense,
    distance,
    layer,
    predicts,
    same_bits,
    some,
    toward,
    update,
    with_adapter,
)

FAST = {"budget": 40, "l1": 0.0}


def weights_of(found) -> Tensor:
    return torch.tensor([list(one.weights[0]) for one in found.tried], dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_weights_are_found_on_a_quadratic(seed: int) -> None:
    parts = [update(i) for i in range(4)]
    planted = [0.9, -0.6, 0.0, 1.2]
    target = sum(w * dense(f) for w, f in zip(planted, parts, strict=True))
    found = lorahub(layer(), [adapter(f) for f in parts], distance(target), budget=300, l1=0.0, seed=seed)
    assert found.weights == pytest.approx(planted, abs=0.02)
    assert found.loss < 1e-3 * found.base
    assert close(dense(found.adapter.factors()["w"]), target, 0.02)


def test_cobyla_finds_them_too_and_draws_nothing() -> None:
    """What the authors' optimizer chooses at the paper's budget: fewer evaluations where the loss is smooth."""
    parts = [update(i) for i in range(3)]
    planted = [0.9, -0.6, 1.2]
    target = sum(w * dense(f) for w, f in zip(planted, parts, strict=True))
    some_, other = (
        lorahub(layer(), [adapter(f) for f in parts], distance(target), search="cobyla", budget=60, l1=0.0, seed=seed) for seed in (0, 1)
    )
    assert some_.weights == pytest.approx(planted, abs=0.05)
    assert some_.tried == other.tried
    assert some_.adapter.meta["search"]["settings"]["search"] == "cobyla"
    outside = lorahub(layer(), [adapter(f) for f in parts], distance(4 * target), search="cobyla", budget=60, l1=0.0)
    assert weights_of(outside).abs().max() <= 1.5 and outside.weights[2] == pytest.approx(1.5, abs=0.05)


def test_planted_weights_are_found_in_a_model() -> None:
    model, adapters = tiny_model("llama"), some(n=2)
    planted = mix(adapters, weights=[0.8, -0.5])
    found = lorahub(model, adapters, toward(with_adapter(model, planted)), budget=120, l1=0.0)
    assert found.weights == pytest.approx([0.8, -0.5], abs=0.03)
    assert close(with_adapter(model, found.adapter), with_adapter(model, planted), 0.1)


def test_planted_weights_are_found_in_the_papers_space_up_to_their_common_sign() -> None:
    model, adapters = tiny_model("llama"), some(n=2, r=2)
    planted = mix(adapters, weights=[0.8, -0.5], space="factor:both")
    found = lorahub(model, adapters, toward(with_adapter(model, planted)), space="factor:both", budget=120, l1=0.0)
    sign = 1 if found.weights[0] > 0 else -1
    assert [sign * w for w in found.weights] == pytest.approx([0.8, -0.5], abs=0.03)
    assert close(with_adapter(model, found.adapter), with_adapter(model, planted), 0.1)


@pytest.mark.parametrize("space", ["delta", "factor:both"])
def test_the_loss_is_that_of_the_adapter_that_comes_out(space: str) -> None:
    model, adapters = tiny_model("llama"), some(r=2)
    target = with_adapter(model, mix(adapters, weights=[0.5, 0.4, -0.3]))
    found = lorahub(model, adapters, toward(target), space=space, budget=20)
    again = (with_adapter(model, found.adapter) - target).square().sum() / (target.shape[0] * target.shape[1])
    assert found.loss == pytest.approx(float(again), rel=1e-3)
    assert found.adapter.meta["mix"]["weights"] == found.weights
    assert found.adapter.meta["mix"]["space"] == space


@pytest.mark.parametrize("search", ["cma", "cobyla"])
@pytest.mark.parametrize("budget", [1, 2, 8, 9, 40])
def test_exactly_the_budget_is_spent_and_never_a_gradient(budget: int, search: str) -> None:
    saved: list[Tensor] = []
    objective, calls = counted(predicts())
    model = tiny_model("llama")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        found = lorahub(model, some(), objective, budget=budget, search=search)
    assert calls == [False] * budget
    assert len(found.tried) == budget and not saved
    assert all(p.grad is None for p in model.parameters())


def test_it_starts_at_the_base_and_ends_no_worse() -> None:
    model, adapters = tiny_model("llama"), some()
    base = logits(model)
    found = lorahub(model, adapters, toward(base), budget=10)
    assert found.tried[0].weights == ((0.0, 0.0, 0.0),)
    assert found.weights == [0.0, 0.0, 0.0] and found.loss == found.base == 0
    assert torch.equal(with_adapter(model, found.adapter), base)


def test_the_best_of_all_that_were_tried_is_kept() -> None:
    found = lorahub(tiny_model("llama"), some(), predicts(), budget=25, l1=0.2)
    best = min(found.tried, key=lambda one: one.score)
    assert found.weights == list(best.weights[0]) and found.loss == best.loss
    assert found.adapter.meta["search"]["evaluations"] == 25


def test_the_penalty_is_l1_times_the_mean_size() -> None:
    found = lorahub(tiny_model("llama"), some(), predicts(), budget=6)
    for one in found.tried:
        assert one.score - one.loss == pytest.approx(0.05 * sum(map(abs, one.weights[0])) / 3, abs=1e-12)
    small = lorahub(layer(), [adapter(update(0))], distance(dense(update(0))), budget=60, l1=100.0)
    large = lorahub(layer(), [adapter(update(0))], distance(dense(update(0))), budget=60, l1=0.0)
    assert abs(small.weights[0]) < 0.5 < large.weights[0] == pytest.approx(1, abs=0.02)


def test_the_same_seed_makes_the_same_weights_and_nobody_elses_numbers_are_drawn() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, other = (lorahub(tiny_model("llama"), some(), predicts(), budget=20, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()
    assert one.tried == other.tried
    assert all(torch.equal(one.adapter.tensors[k], other.adapter.tensors[k]) for k in one.adapter.tensors)
    assert lorahub(tiny_model("llama"), some(), predicts(), budget=20, seed=5).tried != one.tried


@pytest.mark.parametrize("bound", [0.05, 1.5])
def test_no_weight_leaves_the_box(bound: float) -> None:
    parts = [update(i) for i in range(3)]
    target = sum(2 * bound * dense(f) for f in parts)  # far outside
    found = lorahub(layer(), [adapter(f) for f in parts], distance(target), bound=bound, budget=150, l1=0.0)
    assert weights_of(found).abs().max() <= bound
    assert weights_of(found)[1:].std() > bound / 20, "it moves at all"
    assert found.weights == pytest.approx([bound] * 3, rel=0.1)


def test_the_adapters_stay_as_they_are() -> None:
    adapters = some(r=2)
    before = bits(adapters)
    for space in ("delta", "factor", "factor:both"):
        lorahub(tiny_model("llama"), adapters, predicts(), space=space, budget=5)
    assert same_bits(before, adapters)


def test_one_adapter_is_searched_too() -> None:
    found = lorahub(layer(), [adapter(update(0))], distance(-0.7 * dense(update(0))), budget=80, l1=0.0)
    assert found.weights == pytest.approx([-0.7], abs=0.02)


def test_reflection_stays_inside_and_is_the_identity_there() -> None:
    z = np.linspace(-7, 7, 141)
    assert np.allclose(reflected(z, 1.5)[np.abs(z) <= 1.5], z[np.abs(z) <= 1.5])
    assert np.abs(reflected(z, 1.5)).max() <= 1.5
    assert reflected(np.array([2.0, -2.0, 3.0, 4.5, 0.0]), 1.5) == pytest.approx([1.0, -1.0, 0.0, -1.5, 0.0])


def test_losses_that_are_no_numbers_are_passed_over() -> None:
    def broken(model):
        x = model["w"].lora.branches  # the adapter's own weights say where we are
        w = next(iter(x.values())).delta.weights()
        return [(torch.where(w[0] > 0.2, torch.nan, (w[0] + 1) ** 2), 1)]

    found = lorahub(layer(), [adapter(update(0)), adapter(update(1))], broken, budget=60, l1=0.0)
    assert found.weights[0] == pytest.approx(-1, abs=0.1)
    with pytest.raises(DataError, match="none of 5 evaluations gave a finite loss"):
        lorahub(layer(), [adapter(update(0))], lambda model: [(torch.tensor(torch.nan), 1)], budget=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "lorahub: budget=0: expected at least 1"),
        ({"bound": 0.0}, "lorahub: bound=0.0: expected more than 0"),
        ({"bound": float("inf")}, "lorahub: bound=inf"),
        ({"l1": -1.0}, "lorahub: l1=-1.0"),
        ({"space": "core"}, "lorahub: space='core': expected 'delta', 'factor' or 'factor:both'"),
        ({"bugdet": 3}, "lorahub has no option 'bugdet'. Did you mean 'budget'"),
    ],
)
def test_what_was_typed_wrong(options: dict, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        lorahub(layer(), [adapter(update(0))], distance(dense(update(0))), **options)


def test_missing_packages_are_named_before_the_model_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    objective, calls = counted(predicts())
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    for search in ("cma", "cobyla"):
        with pytest.raises(MissingExtra, match=r"lorakit\[search\]"):
            lorahub(tiny_model("llama"), some(), objective, search=search)
    assert not calls


def test_the_search_stands_where_it_says() -> None:
    search = Boxed(3, 1.5, 0)
    assert (search.mean == 0).all()
    asked = search.ask()
    search.tell((asked**2).sum(1))
    assert search.mean.shape == (3,) and np.abs(search.mean).max() <= 1.5
