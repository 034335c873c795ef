"""How modules start."""

import math

import pytest
import torch

from lorakit import BadParameter, Incompatible, get_method
from lorakit.core import random
from lorakit.parts.inits.module import Glorot, Near, Silent, truncated
from tests.laws.subject import subject


def test_silent():
    for branch in subject("adapter_houlsby", awake=False).branches():
        delta = branch.delta
        bound = 1 / math.sqrt(32)
        assert 0.9 * bound < delta.A.abs().max() <= bound
        assert not any(t.count_nonzero() for t in (delta.a, delta.B, delta.b))


def test_truncated_normal():
    drawn = truncated(torch.empty(100, 100), 0.5, random.generator(0, ""))
    assert 0.95 < drawn.abs().max() <= 1.0, "at two std"
    assert drawn.std() == pytest.approx(0.5 * 0.8796, rel=0.02), "of a normal cut at two std"
    assert torch.equal(drawn, truncated(torch.empty(100, 100), 0.5, random.generator(0, "")))


def test_glorot_is_of_each_factor_by_itself():
    delta = subject("compacter", awake=False, rho=3, init="near").branches()[0].delta
    for name in ("AS", "AT", "BS", "BT"):
        tensor = getattr(delta, name)
        bound = math.sqrt(2 * 6 / sum(tensor.shape[1:]))
        assert 0.6 * bound < tensor.abs().max() <= bound, name


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadParameter, match="std=0"):
        Near(0)
    for init, name in ((Silent(), "compacter"), (Near(0.1), "compacter"), (Glorot(), "adapter_houlsby")):
        with pytest.raises(Incompatible):
            get_method(name).but(init=init)
