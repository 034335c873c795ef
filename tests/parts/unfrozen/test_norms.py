"""The norms of a model, whatever it calls them."""

import pytest
import torch

from lorakit import attach, get_method
from lorakit.core.unfreeze import unfreeze
from lorakit.parts.unfrozen.norms import Norms
from tests.laws.subject import base


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "t5", "bert"])
def test_norms_are_found_under_any_name(arch):
    model = base(arch)
    found = {id(u.original) for u in unfreeze(model, (Norms(),))}
    assert found == {id(p) for n, p in model.named_parameters() if any(k in n.lower() for k in ("norm", "ln_"))}
    assert all(u.attribute == "bias" for u in unfreeze(model, (Norms(only_biases=True),)))


def test_of_a_bf16_model_too_whose_norms_are_cast():
    adapted = attach(base("llama", torch.bfloat16), get_method("adapter_houlsby", r=4))
    assert len({id(u.original) for u in unfreeze(adapted.model, (Norms(),))}) == 2 * 2 + 1


def test_a_model_without_any_has_none():
    assert unfreeze(torch.nn.Sequential(torch.nn.Linear(2, 2)), (Norms(),)) == []
    assert unfreeze(base("llama"), (Norms(only_biases=True),)) == []
