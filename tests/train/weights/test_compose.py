"""Learned composition's acceptance properties (arXiv:2402.15414)."""

import itertools

import pytest
import torch

from lorakit.adapters.mix import mix
from lorakit.core.errors import BadParameter
from lorakit.train.weights import learned_composition
from tests.adapters.subject import tiny_model
from tests.train.weights.world import (
    D_IN,
    D_OUT,
    adapter,
    bits,
    close,
    counted,
    dense,
    distance,
    layer,
    on_layer,
    predicts,
    same_bits,
    some,
    toward,
    update,
    with_adapter,
)


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("by", ["model", "layer", "module"])
def test_it_starts_at_the_average(by: str, normalize: str) -> None:
    model, adapters = tiny_model("llama"), some()
    average = with_adapter(model, mix(adapters, "average"))
    seen = []

    def watch(m):
        seen.append(m(input_ids=torch.arange(5)[None]).logits.detach())
        return toward(average)(m)

    found = learned_composition(model, adapters, watch, by=by, normalize=normalize, steps=1)
    first = found.tried[0]
    assert all(w == pytest.approx(1 / 3) for row in first.weights for w in row)
    assert first.loss < 1e-8 and found.loss == first.loss
    assert close(with_adapter(model, found.adapter), average)
    assert close(seen[1], with_adapter(model, mix(adapters, "average"), torch.arange(5)[None]))


@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_the_task_that_one_adapter_was_made_for_makes_its_weight_1(normalize: str) -> None:
    parts = [update(i) for i in range(4)]
    found = learned_composition(layer(), [adapter(f) for f in parts], distance(dense(parts[2])), by="model", normalize=normalize, steps=400)
    assert found.weights == pytest.approx([0, 0, 1, 0], abs=0.02)
    assert found.loss < 1e-3 * found.tried[0].loss


def test_a_planted_mixture_is_found() -> None:
    parts = [update(i) for i in range(3)]
    target = 0.9 * dense(parts[0]) - 0.7 * dense(parts[1])
    adapters = [adapter(f) for f in parts]
    free = learned_composition(layer(), adapters, distance(target), by="model", normalize="none", steps=200)
    assert free.weights == pytest.approx([0.9, -0.7, 0], abs=0.01)
    convex = learned_composition(layer(), adapters, distance(target), by="model", steps=200)
    assert sum(convex.weights) == pytest.approx(1) and min(convex.weights) >= 0
    assert convex.loss > 10 * free.loss


@pytest.mark.parametrize(("by", "rows"), [("model", 1), ("layer", 2), ("module", 14)])
def test_finer_weights_fit_what_coarser_ones_cannot(by: str, rows: int) -> None:
    """Layer 0 from one adapter, layer 1 from another."""
    model, adapters = tiny_model("llama"), some(n=2)
    planted = mix(adapters, weights=[{r"layers\.0\..*": 1.0, "default": 0.0}, {r"layers\.1\..*": 1.0, "default": 0.0}])
    found = learned_composition(model, adapters, toward(with_adapter(model, planted)), by=by, steps=60)
    assert len(found.tried[0].weights) == rows
    assert (found.loss < 0.02 * found.tried[0].loss) == (by != "model")
    if by == "layer":
        assert [w for row in min(found.tried, key=lambda one: one.loss).weights for w in row] == pytest.approx([1, 0, 0, 1], abs=0.1)
        first = next(w for name, w in found.weights[0].items() if "layers\\.0\\." in name)
        assert first > 0.9


@pytest.mark.parametrize("by", ["model", "layer", "module"])
def test_the_loss_is_that_of_the_adapter_that_comes_out(by: str) -> None:
    model, adapters = tiny_model("llama"), some(n=2)
    target = with_adapter(model, mix(adapters, weights=[0.9, 0.1]))
    found = learned_composition(model, adapters, toward(target), by=by, steps=5)
    again = (with_adapter(model, found.adapter) - target).square().sum() / (target.shape[0] * target.shape[1])
    assert found.loss == pytest.approx(float(again), rel=1e-3)
    assert found.loss < found.tried[0].loss
    assert found.adapter.recipe.name == "lora"
    assert found.adapter.meta["search"]["how"] == "learned"


def test_the_adapters_are_bit_identical_and_nothing_is_drawn() -> None:
    model, adapters = tiny_model("llama"), some()
    before, weights = bits(adapters), {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    one, other = (learned_composition(model, adapters, predicts(), steps=4) for _ in range(2))
    assert same_bits(before, adapters)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and one.tried == other.tried


def test_one_forward_of_all_examples_a_step_the_base_and_the_end() -> None:
    objective, calls = counted(predicts())
    found = learned_composition(tiny_model("llama"), some(n=2), objective, steps=6)
    assert calls == [False, *[True] * 6, False]
    assert len(found.tried) == 7


def test_the_best_of_the_weights_passed_through_is_kept() -> None:
    parts = [update(i) for i in range(2)]
    far = learned_composition(
        layer(), [adapter(f) for f in parts], distance(dense(parts[0])), by="model", normalize="none", steps=3, lr=50.0
    )
    assert far.weights == [0.5, 0.5] and far.loss == far.tried[0].loss
    assert all(one.loss > far.loss for one in far.tried[1:])


def test_the_rate_falls_linearly_to_nothing() -> None:
    """Under a constant slope each of Adam's steps is as long as its rate."""
    slope = torch.ones(D_OUT, D_IN, dtype=torch.float64)
    found = learned_composition(
        layer(), [adapter(update(0))], lambda m: [((on_layer(m) * slope).sum(), 1)], by="model", normalize="none", steps=4, lr=0.2
    )
    w = [one.weights[0][0] for one in found.tried]
    assert [abs(b - a) for a, b in itertools.pairwise(w)] == pytest.approx([0.2, 0.15, 0.1, 0.05], rel=1e-4)


def test_the_base_is_measured() -> None:
    target = dense(update(0))
    found = learned_composition(layer(), [adapter(update(0)), adapter(update(1))], distance(target), steps=1)
    assert found.base == pytest.approx(float(target.square().sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "head"}, "learned: by='head': expected 'model', 'layer' or 'module'"),
        ({"normalize": "sum"}, "learned: normalize='sum'"),
        ({"steps": 0}, "learned: steps=0"),
        ({"lr": float("nan")}, "learned: lr=nan"),
    ],
)
def test_what_was_typed_wrong(options: dict, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        learned_composition(layer(), [adapter(update(0))], distance(dense(update(0))), **options)
