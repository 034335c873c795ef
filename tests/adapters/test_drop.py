"""Layers taken off a finished adapter."""

import pytest

from lorakit import BadParameter
from lorakit.adapters.drop import without_first
from lorakit.core.attach import attach_adapter
from tests.laws.subject import base, batch, logits, same_bits, subject


def test_taking_layers_off_a_finished_adapter():
    state = subject("adapter_houlsby").state()
    short = without_first(state, 1)
    assert {s.layer for s in short.sites} == {1}
    assert len(short.tensors) < len(state.tensors)
    assert {k for k in state.tensors if k.startswith("unfrozen.")} <= short.tensors.keys()
    assert without_first(state, 0).tensors.keys() == state.tensors.keys()
    for n in (2, -1):
        with pytest.raises(BadParameter, match=f"n={n} leaves nothing of an adapter with 2 layers; expected 0 <= n < 2"):
            without_first(state, n)


def test_what_is_left_is_what_it_was():
    adapted = subject("compacter", train_norms=False)
    short = without_first(adapted.state(), 1)
    assert {k for k in short.tensors if k.startswith("lora_shared.")} == {"lora_shared.pool.R"}
    for branch in adapted.branches():
        branch.w = float(branch.site.layer >= 1)
    assert same_bits(logits(attach_adapter(base(), short).model, batch()), logits(adapted.model, batch()))
