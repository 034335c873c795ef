"""Init[A] versus Init[B]: acceptance properties (arXiv:2406.08447)."""

import math

import pytest
import torch
from torch import nn

from lorakit import attach, get_method
from tests.laws.steps import Run
from tests.laws.subject import batch, loss_of, subject
from tests.methods.tools import layer, normal


def test_first_gradients() -> None:
    for init, still, moving in (("A", "A", "B"), ("B", "B", "A")):
        adapted = subject("init_ab", awake=False, init=init)
        loss_of(adapted.model, batch()).backward()
        for branch in adapted.branches():
            assert not getattr(branch.delta, still).grad.any(), "its partner is zero"
            assert getattr(branch.delta, moving).grad.abs().max() > 0
            assert getattr(branch.delta, still).any()
            assert not getattr(branch.delta, moving).any()


@pytest.mark.parametrize("width", [64, 512, 4096])
def test_a_x_has_variance_one_at_any_width(width: int) -> None:
    x = normal(64, width, seed=1, dtype=torch.float32)
    delta = {
        init: layer(get_method("init_ab", r=64, init=init, sites="w"), d_in=width, d_out=64).branches()[0].delta.float() for init in "AB"
    }
    assert (x @ delta["A"].A.T).var().item() == pytest.approx(1.0, rel=0.1)
    assert not (x @ delta["B"].A.T).any()
    z = normal(64, 64, seed=2, dtype=torch.float32)
    assert (z @ delta["B"].B.T).var().item() == pytest.approx(1.0, rel=0.1)


def final_loss(width: int, init: str, lr: float, *, steps: int = 5, seed: int = 0) -> float:
    """A student f(x) = w₂ᵀ (B A) relu(W₁ x) learns a teacher of two layers; only A and B learn."""
    g = torch.Generator().manual_seed(seed)
    student = nn.Sequential(
        nn.Linear(5, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Linear(width, 1, bias=False)
    )
    with torch.no_grad():
        student[0].weight.normal_(0, 1 / math.sqrt(5), generator=g)
        student[2].weight.zero_()
        student[3].weight.normal_(0, 1 / math.sqrt(width), generator=g)
    x = normal(32, 5, seed=99, dtype=torch.float32)
    hidden, out = normal(5, 16, seed=98, dtype=torch.float32) / math.sqrt(5), normal(16, 1, seed=97, dtype=torch.float32) / 4
    y = torch.relu(x @ hidden) @ out
    adapted = attach(student, get_method("init_ab", r=4, alpha=4.0, sites="2", init=init), seed=seed)
    run = Run(adapted, total=steps, lr=lr, clip=1e9, data=lambda i: x, loss=lambda m, b: (m(b) - y).square().mean())
    return min(sum(run.step().item() for _ in range(steps)) / steps, 1e9)


def best_rate(width: int, init: str) -> float:
    rates = [2 ** (e / 2) for e in range(-28, -6)]
    return min(rates, key=lambda lr: sum(final_loss(width, init, lr, seed=s) for s in range(3)))


@pytest.mark.slow
def test_the_best_rate_of_init_a_exceeds_init_bs_by_a_factor_that_grows_with_the_width() -> None:
    factors = {width: best_rate(width, "A") / best_rate(width, "B") for width in (64, 512, 2048)}
    assert all(f >= 1 for f in factors.values())
    assert factors[2048] >= 2 * factors[64], factors
