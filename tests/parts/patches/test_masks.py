"""Attention masks in both forms."""

import pytest
import torch
from torch import Tensor

from lorakit.parts.patches.masks import additive, causal, lengthened, restricted, visible

LOW = torch.finfo(torch.float32).min


def both(mask: Tensor) -> list[Tensor]:
    """A bool mask, and the same as numbers."""
    return [mask, torch.zeros(mask.shape).masked_fill(~mask, LOW)]


def test_causal_is_upper_left_also_over_a_longer_cache() -> None:
    assert causal(3, 5, torch.device("cpu"))[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("form", [0, 1])
def test_each_function_keeps_the_form_and_means_the_same(form: int) -> None:
    seen = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    more = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = both(seen)[form]
    longer = torch.cat([torch.ones(2, 1, 4, 2).bool(), seen], dim=3)
    for out, want in ((restricted(mask, more), seen & more), (lengthened(mask, 2), longer)):
        assert out is not None
        assert out.dtype == mask.dtype
        assert torch.equal(visible(out), want)
    assert torch.equal(visible(mask), seen)
    numbers = additive(mask, torch.float32)
    assert numbers is not None
    assert torch.equal(numbers, both(seen)[1])


def test_biases_of_the_scores_survive() -> None:
    bias = torch.tensor([[[[0.0, -3.0], [2.0, LOW]]]])
    out = restricted(bias, torch.tensor([[[[True, True], [False, True]]]]))
    assert out.tolist() == [[[[0.0, -3.0], [LOW, LOW]]]]
    assert lengthened(bias, 1)[0, 0].tolist() == [[0.0, 0.0, -3.0], [0.0, 2.0, LOW]]


def test_no_mask_is_every_key() -> None:
    assert lengthened(None, 3) is None
    assert additive(None, torch.float32) is None
    seen = torch.tensor([[True, False]])
    assert restricted(None, seen) is seen
