"""The losses of single rows are the reference's, in value and gradients; the same bits without gradients; whole logits never live."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.ops import cross_entropy, reference
from lorakit.ops.cross_entropy import IGNORED, head_losses
from tests.ops.test_cross_entropy import D, Largest, N, V, adapted_head, agree, draw, everything, labels, linear

WEIGHTS = draw(N, seed=9)


def weighed(losses: Tensor) -> Tensor:
    """Another weight for each row, as no sum has."""
    return (losses * WEIGHTS.to(losses.dtype)).sum()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, N, 99])
@pytest.mark.parametrize("ignored", [0, 3, N])
def test_rows_are_the_references(trained: bool, bias: bool, rows: int, ignored: int) -> None:
    check_rows(trained, bias, rows, ignored)


def check_rows(trained: bool = False, bias: bool = True, rows: int = 4, ignored: int = 3) -> None:
    head, h, y = linear(bias=bias, trained=trained), draw(N, D), labels(N, V, ignored=ignored)
    found = everything(lambda x: weighed(head_losses(x, head, y, rows=rows)), h, head)
    agree(found, everything(lambda x: weighed(reference.head_losses(x, head, y)), h, head))
    assert (head_losses(h, head, y)[y == IGNORED] == 0).all()


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_head_that_learns(name: str) -> None:
    model, head = adapted_head(name)
    h, y = draw(N, head.in_features), labels(N, head.out_features, ignored=2)
    found = everything(lambda x: weighed(head_losses(x, head, y, rows=4)), h, model)
    agree(found, everything(lambda x: weighed(reference.head_losses(x, head, y)), h, model), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_with_and_without_gradients_the_bits_are_the_same(dtype: torch.dtype, trained: bool) -> None:
    head, y = linear(64, 301, trained=trained, dtype=dtype), labels(40, 301)
    h = draw(40, 64, dtype=dtype).requires_grad_()
    with_graph = head_losses(h, head, y, rows=16)
    with torch.no_grad():
        assert torch.equal(head_losses(h, head, y, rows=16), with_graph)
    assert with_graph.requires_grad


@pytest.mark.parametrize("trained", [False, True])
def test_whole_logits_never_live(trained: bool) -> None:
    head, h, y = linear(4, 40, trained=trained), draw(64, 4).requires_grad_(), labels(64, 40)
    with Largest() as seen:
        head_losses(h, head, y, rows=8).sum().backward()
    assert seen.numel == 8 * 40


def test_a_second_derivative_is_refused_not_wrong() -> None:
    h = draw(N, D).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(head_losses(h, linear(), labels(N, V)).sum(), h, create_graph=True)


def _one_weight_for_all(m: pytest.MonkeyPatch) -> None:
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.saved_tensors[0] * dy.mean()

    m.setattr(cross_entropy._KnownRows, "backward", staticmethod(backward))


def test_mutants_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _one_weight_for_all(monkeypatch)
    with pytest.raises(AssertionError):
        check_rows()
