"""ControlPE's acceptance properties (arXiv:2311.09773)."""

import itertools

import pytest
import torch

from lorakit.core.errors import BadParameter
from lorakit.train.weights import control_pe
from lorakit.train.weights.weighed import together
from tests.adapters.subject import logits, tiny_model
from tests.train.weights.world import (
    adapter,
    close,
    counted,
    dense,
    distance,
    layer,
    on_layer,
    predicts,
    some,
    toward,
    update,
    with_adapter,
)

TENTHS = tuple(round(0.1 * i, 1) for i in range(11))


@pytest.mark.parametrize("best", [0.0, 0.3, 1.0])
def test_the_best_of_the_grid_on_a_quadratic(best: float) -> None:
    found = control_pe(layer(), [adapter(update(0))], distance((best + 0.02) * dense(update(0))))
    assert found.weights == [best]
    assert [one.weights[0][0] for one in found.tried] == list(TENTHS)
    size = float(dense(update(0)).square().sum())
    assert [one.loss for one in found.tried] == pytest.approx([(a - best - 0.02) ** 2 * size for a in TENTHS], rel=1e-5, abs=1e-9)
    assert close(dense(found.adapter.factors()["w"]), best * dense(update(0))) if best else found.loss == found.base


def test_two_prompts_make_a_table_of_pairs() -> None:
    f, g = update(0), update(1)
    values = (-0.5, 0.0, 0.5, 1.5)
    found = control_pe(layer(), [adapter(f), adapter(g)], distance(1.5 * dense(f) - 0.5 * dense(g)), values=values)
    assert found.weights == [1.5, -0.5] and found.loss < 1e-9
    assert [one.weights[0] for one in found.tried] == list(itertools.product(values, values))
    assert found.base == pytest.approx(float((1.5 * dense(f) - 0.5 * dense(g)).square().sum()))


def test_alpha_0_is_the_base_and_the_effect_is_affine_in_alpha() -> None:
    model, (one,) = tiny_model("llama"), some(n=1)
    assert control_pe(model, [one], toward(logits(model))).weights == [0.0]
    with together(model, [one], force=True) as here:
        here.set_([[0.0]])
        zero = logits(model)
    assert torch.equal(zero, logits(model))
    linear = layer()
    with together(linear, [adapter(update(0))]) as here:
        outputs = []
        for alpha in (0.0, 1.0, 0.3, -2.0):
            here.set_([[alpha]])
            outputs.append(on_layer(linear).detach())
    for alpha, found in zip((0.3, -2.0), outputs[2:], strict=True):
        assert close(found - outputs[0], alpha * (outputs[1] - outputs[0]), 1e-6)


def test_alpha_comes_into_the_adapter_once() -> None:
    model, (one,) = tiny_model("llama"), some(n=1)
    found = control_pe(model, [one], toward(with_adapter(model, one)), values=(0.5,))
    assert found.base is None
    half, whole = (adapted.factors() for adapted in (found.adapter, one))
    assert all(close(half[k].s * half[k].B @ half[k].A, 0.5 * whole[k].s * whole[k].B @ whole[k].A) for k in whole)


def test_of_equals_the_first() -> None:
    found = control_pe(layer(), [adapter(update(0))], lambda model: [(torch.zeros(()), 1)], values=(0.4, 0.2))
    assert found.weights == [0.4]


@pytest.mark.parametrize(("typed", "values"), [("0, 0.5,1", (0.0, 0.5, 1.0)), (0.5, (0.5,)), (2, (2.0,)), ([0, 1], (0.0, 1.0))])
def test_a_grid_as_it_is_typed(typed: object, values: tuple[float, ...]) -> None:
    found = control_pe(layer(), [adapter(update(0))], distance(dense(update(0))), values=typed)
    assert tuple(one.weights[0][0] for one in found.tried) == values
    with pytest.raises(BadParameter, match="grid: values='0;1': expected a number"):
        control_pe(layer(), [adapter(update(0))], distance(dense(update(0))), values="0;1")


def test_a_grid_that_is_too_large_and_one_that_is_empty() -> None:
    objective, calls = counted(predicts())
    with pytest.raises(BadParameter, match="11 values for 3 adapters are 1331 evaluations; give fewer values, or take lorahub"):
        control_pe(tiny_model("llama"), some(), objective)
    with pytest.raises(BadParameter, match=r"grid: values=\(\): .* should have at least 1 item"):
        control_pe(tiny_model("llama"), some(), objective, values=())
    with pytest.raises(BadParameter, match="grid: values=.*finite"):
        control_pe(tiny_model("llama"), some(), objective, values=(0.0, float("nan")))
    assert not calls
