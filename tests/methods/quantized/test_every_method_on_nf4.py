"""The table: every registered method on a base in NF4 works, that is, as on plain weights of the decoded values, or is refused when built.

A refusal gives one of REASONS and leaves no trace. A method that writes into the base (`absorb`) says what the grid lost.
"""

import re

import pytest
import torch
from torch import nn

from lorakit import Adapted, Incompatible, describe, list_methods, quantize
from lorakit.core.base import expand
from lorakit.parts.bases.nf4_base import NF4
from tests.laws.steps import Run
from tests.laws.subject import attached, awaken, base, batch, far, logits, refuses_merge, same_bits, small

REASONS = "whose packed codes cannot be trained|only plain linear weights"
ABSORBS = [name for name in list_methods() if "absorb" in describe(name).parameters]
OWN = [name for name in list_methods() if small(name).base is not None]
"""Methods that store the base themselves."""


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight.detach().clone() for m in model.modules() if getattr(type(m), "storage", None) is NF4]


def fresh() -> nn.Module:
    return quantize(base("llama", torch.float64))


def trained(name: str, model: nn.Module, **kwargs: object) -> tuple[Adapted, list[float]]:
    adapted = awaken(attached(model, small(name, **kwargs)))
    run = Run(adapted, total=8)
    losses = [run.step().item() for _ in range(3)]
    return run.finish(), losses


def refused(name: str) -> bool:
    """Whether the method is refused, as it must be: with a reason, and nothing changed."""
    model = fresh()
    want = logits(model, batch())
    try:
        attached(model, small(name)).detach()
        return False
    except Incompatible as error:
        reason = str(error)
    assert re.search(REASONS, reason), reason
    assert same_bits(logits(model, batch()), want)
    return True


def check_table(name: str, **kwargs: object) -> None:
    ours, losses = trained(name, fresh(), **kwargs)
    theirs, wanted = trained(name, expand(fresh()), **kwargs)
    assert losses == pytest.approx(wanted, rel=1e-9)
    want = logits(theirs.model, batch())
    assert far(logits(ours.model, batch()), want) < 1e-8
    before = codes(fresh())
    assert all(same_bits(a, b) for a, b in zip(codes(ours.model), before, strict=True)), "the base was changed"
    if not refuses_merge(ours):
        assert far(logits(ours.merge(), batch()), want) < 1e-8
    assert all(same_bits(a, b) for a, b in zip(codes(ours.detach()), before, strict=True))


@pytest.mark.parametrize("name", [n for n in list_methods() if n not in OWN])
def test_it_works_as_on_the_decoded_weights_or_is_refused(name: str) -> None:
    if not refused(name):
        check_table(name, **({"absorb": False} if name in ABSORBS else {}))


@pytest.mark.parametrize("name", ABSORBS)
def test_what_writes_into_the_base_says_what_that_lost(name: str) -> None:
    ours, _ = trained(name, fresh())
    assert any("the base's storage held" in note for note in ours.notes)
    assert all(same_bits(a, b) for a, b in zip(codes(ours.model), codes(fresh()), strict=True))


@pytest.mark.parametrize("name", OWN)
def test_what_stores_the_base_itself_takes_one_that_is_stored_so(name: str) -> None:
    method = small(name)
    assert method.base is not None
    model = quantize(base("llama"), method.base)
    adapted = attached(model, method)
    with adapted.disabled():
        assert same_bits(logits(model, batch()), logits(quantize(base("llama"), method.base), batch()))


def test_the_table_tells_works_from_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("flora_gc"), "it trains the whole weights"
    assert not refused("dora")
    product = NF4.matmul
    monkeypatch.setattr(NF4, "matmul", lambda self, x: 1.001 * product(self, x))  # what DoRA's norm is made of
    with pytest.raises(AssertionError):
        check_table("dora")
