"""L1: at init the output is the base's, bit for bit; to rounding where the start is a difference of equal parts (an anchor)."""

import pytest
import torch

from lorakit import list_methods
from tests.laws.subject import attached, base, batch, far, logits, provides, same_bits, small, stored


def check_L1(name: str) -> None:
    for arch, sites in (("llama", "all-linear"), ("llama", "embedding"), ("gpt2", "attention"), ("bert", "all-linear")):
        method = small(name, sites=sites, dropout=0.25)
        model, want = base(arch), logits(stored(base(arch), method), batch())
        adapted = attached(model, method)
        for training in (False,) if method.patches else (False, True):  # a patch may act in training only: its own tests say how
            model.train(training)
            with adapted.given(step=0):
                got = logits(model, batch())
            if not method.identity:
                assert not same_bits(got, want), "declared as changing the output at init, but it does not"
            elif "anchor" in provides(method):
                assert far(got, want) < 1e-5, (arch, sites, far(got, want))
            else:
                assert same_bits(got, want), (arch, sites, far(got, want))


def check_L1_half(name: str) -> None:
    """On a bf16 base, too."""
    method = small(name)
    model, want = base("llama", torch.bfloat16), logits(stored(base("llama", torch.bfloat16), method), batch())
    got = logits(attached(model, method).model, batch())
    assert got.dtype == torch.bfloat16
    if method.identity:
        assert torch.equal(got, want) or ("anchor" in provides(method) and far(got, want) < 2e-2)


@pytest.mark.parametrize("name", list_methods())
def test_L1(name: str) -> None:
    check_L1(name)


@pytest.mark.parametrize("name", list_methods())
def test_L1_half_precision(name: str) -> None:
    check_L1_half(name)
