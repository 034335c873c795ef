"""LoRA+'s acceptance properties (arXiv:2402.12354)."""

import pytest
import torch

from lorakit import Adapted, BadParameter, attach, get_method
from lorakit.parts.optimizers.adamw import AdamW
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, loss_of, same_bits, small, subject


def optimizer(adapted: Adapted, lr: float = 1e-3) -> torch.optim.Optimizer:
    return adapted.methods["default"].optim.build(adapted.params(), lr=lr)


def rates(adapted: Adapted) -> dict[str, float]:
    """Learning rate by parameter name; every parameter in exactly one group."""
    built = optimizer(adapted)
    names = [n for g in built.param_groups for n in g["names"]]
    placed = [id(p) for g in built.param_groups for p in g["params"]]
    assert sorted(names) == sorted(p.name for p in adapted.params())
    assert sorted(placed) == sorted(id(p.tensor) for p in adapted.params())
    return {n: g["lr"] for g in built.param_groups for n in g["names"]}


def test_every_parameter_is_in_one_group_at_its_rate() -> None:
    adapted = subject("loraplus", "bert", ratio=20.0, sites=["all-linear", "word_embeddings"], unfreeze=("LayerNorm",))
    for name, lr in rates(adapted).items():
        if "word_embeddings" in name:
            assert lr == 1e-6, "a fixed rate at embeddings"
        elif name.endswith(".B"):
            assert lr == 20 * 1e-3
        else:
            assert lr == 1e-3, "A, and the one-dimensional norms and biases, which the official code gives B's rate"


def test_other_vectors_stay_at_the_runs_rate() -> None:
    dora = get_method("dora", r=4).but(optim=get_method("loraplus").optim)
    found = rates(attach(base(), dora))
    assert {found[n] for n in found if n.endswith(".m")} == {1e-3}
    assert {found[n] for n in found if n.endswith(".B")} == {16e-3}
    adalora = get_method("adalora", r=4, target_r=2).but(optim=get_method("loraplus").optim)
    found = rates(attach(base(), adalora))
    assert {found[n] for n in found if n.endswith(".g")} == {1e-3}


def test_a_ratio_of_one_is_the_base_optimizer_bit_for_bit() -> None:
    one, plain = subject("loraplus", ratio=1.0, dropout=0.1), subject("lora", dropout=0.1)
    for adapted in (one, plain):
        Run(adapted, total=8).steps(4)
    assert all(same_bits(v, plain.tensors("default")[k]) for k, v in one.tensors("default").items())
    assert len(optimizer(one).param_groups) == 1
    sixteen = subject("loraplus", dropout=0.1)
    Run(sixteen, total=8).steps(4)
    assert not any(torch.equal(v, plain.tensors("default")[k]) for k, v in sixteen.tensors("default").items())


@pytest.mark.parametrize("ratio", [2.0, 16.0])
def test_one_sgd_step_moves_b_by_ratio_times_its_gradient(ratio: float) -> None:
    adapted = awaken(attach(base(), small("loraplus", ratio=ratio)))
    groups = [{"params": g["params"], "lr": g["lr"]} for g in optimizer(adapted, lr=1e-2).param_groups]
    before = {p.name: p.tensor.detach().clone() for p in adapted.params()}
    loss_of(adapted.model, batch()).backward()
    torch.optim.SGD(groups).step()
    steps = {p.name: ((p.tensor - before[p.name]).norm() / p.tensor.grad.norm()).item() for p in adapted.params()}
    for a, b in adapted.params().pairs():
        assert steps[b.name] == pytest.approx(ratio * steps[a.name], rel=1e-3)
        assert steps[a.name] == pytest.approx(1e-2, rel=1e-3)


def test_the_first_adam_step_too() -> None:
    adapted = awaken(attach(base(), small("loraplus")))
    built = AdamW(eps=0.0, ratios=adapted.methods["default"].optim.ratios).build(adapted.params(), lr=1e-3)
    before = {p.name: p.tensor.detach().clone() for p in adapted.params()}
    loss_of(adapted.model, batch()).backward()
    built.step()
    for p in adapted.params():
        moved = (p.tensor - before[p.name]).abs()
        assert moved.median().item() == pytest.approx(1e-3 * (16 if p.role == "B" else 1), rel=1e-3)


def test_ratios_that_cannot_be() -> None:
    for ratio in (0.0, -1.0):
        with pytest.raises(BadParameter, match="ratio > 0"):
            get_method("loraplus", ratio=ratio)
