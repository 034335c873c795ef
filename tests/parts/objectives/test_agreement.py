"""The loss of two forwards that are to agree."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit import BadParameter
from lorakit.core.events import Scored
from lorakit.parts.objectives import agreement
from lorakit.parts.objectives.agreement import Agreement, divergence
from tests.laws.subject import far
from tests.methods.tools import normal


def scored(logits: Tensor, targets: Tensor) -> Scored:
    """Targets of −100 have no loss."""
    return Scored(summed(logits, targets), int((targets >= 0).sum()), logits, targets >= 0)


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def check_definition(weight: float = 0.7) -> None:
    a, b = normal(2, 5, 7, seed=1), normal(2, 5, 7, seed=2)
    targets = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(0))
    targets[0, 3:] = -100
    loss, n = Agreement(weight)(lambda i: scored((a, b)[i], targets), None)
    p, q = (x[targets >= 0].softmax(-1) for x in (a, b))
    kl = sum((x * (x / y).log()).sum() for x, y in ((p, q), (q, p)))
    assert n == 8
    assert far(loss, 0.5 * (summed(a, targets) + summed(b, targets)) + weight * 0.5 * kl) < 1e-12


def test_it_is_as_defined() -> None:
    check_definition()


MUTANTS = {
    "one direction": lambda a, b: (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(),
    "a mean": lambda a, b: divergence(a, b) / len(a),
    "nothing": lambda a, b: torch.zeros((), dtype=a.dtype),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_are_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "divergence", MUTANTS[what])
    with pytest.raises(AssertionError):
        check_definition()


def test_equal_forwards_agree_and_the_gradient_reaches_both() -> None:
    a, b = (normal(3, 5, seed=i).requires_grad_() for i in (1, 2))
    assert divergence(a, a).item() == 0
    for g in torch.autograd.grad(divergence(a, b), (a, b)):
        assert g.abs().max() > 1e-3
    assert torch.autograd.grad(divergence(a, a.detach().clone()), a)[0].abs().max() < 1e-12
    half = divergence(a.to(torch.bfloat16), b.to(torch.bfloat16))
    assert half.dtype == torch.float32
    assert far(half.double(), divergence(a, b)) < 0.05


def test_no_weight_is_no_objective() -> None:
    with pytest.raises(BadParameter, match="positive"):
        Agreement(0.0)
