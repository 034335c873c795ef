"""L14: gradients are equal under activation checkpointing, with dropout, also with two forwards before one backward."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from lorakit import Incompatible, list_methods
from tests.laws.subject import attached, awaken, batch, loss_of, refusal, same_bits, small, subject


def gradients(name: str, *, checkpointing: bool, given: bool, backwards: int = 1) -> list[Tensor]:
    """Of two forwards on two batches under two keys, then one backward."""
    adapted = subject(name, dropout=0.25)
    model = adapted.model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)

    def contexts() -> Iterator[AbstractContextManager[object]]:
        for step in (3, 4):
            yield adapted.given(step=step) if given else nullcontext()

    losses = []
    for i, context in enumerate(contexts()):
        with context:
            losses.append(loss_of(model, batch(i)))
    for _ in range(backwards):
        sum(losses).backward(retain_graph=True)
    if checkpointing and given:
        assert not adapted.cell.given, "recomputation left its own context behind"
    return [p.tensor.grad for p in adapted.params()]


def check_L14(name: str) -> None:
    for given in (True, False):
        for backwards in (1, 2):
            plain = gradients(name, checkpointing=False, given=given, backwards=backwards)
            again = gradients(name, checkpointing=True, given=given, backwards=backwards)
            assert all(g.count_nonzero() for g in plain)
            assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True)), (given, backwards)


def check_L14_reentrant(name: str) -> None:
    adapted = subject(name)
    adapted.model.train().activation_checkpointing_enable({"use_reentrant": True})
    assert "use_reentrant" in refusal(Incompatible, lambda: loss_of(adapted.model, batch()))


def check_L14_again(name: str) -> None:
    """A second attach to a model that was checkpointed under the first one carries its own context."""
    adapted = subject(name, dropout=0.25)
    model = adapted.model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss_of(model, batch()).backward()
    adapted.detach()
    second = awaken(attached(model, small(name, dropout=0.25)))
    found = []
    for checkpointing in (True, False):
        if not checkpointing:
            model.activation_checkpointing_disable()
        for p in second.params():
            p.tensor.grad = None
        with second.given(step=1):
            one = loss_of(model, batch(1))
        with second.given(step=2):
            (one + loss_of(model, batch(2))).backward()
        found.append([p.tensor.grad for p in second.params()])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", list_methods())
def test_L14(name: str) -> None:
    check_L14(name)


@pytest.mark.parametrize("name", list_methods())
def test_L14_reentrant_is_refused(name: str) -> None:
    check_L14_reentrant(name)


@pytest.mark.parametrize("name", list_methods())
def test_L14_second_attach(name: str) -> None:
    check_L14_again(name)
