"""Gates from logits."""

import pytest
import torch

from lorakit.parts.routers import softmax
from tests.methods.tools import normal


def test_gates_are_computed_in_fp32_at_least() -> None:
    logits = normal(5, 4)
    assert softmax.dense(logits.bfloat16()).dtype == torch.float32
    assert softmax.dense(logits).dtype == torch.float64
    assert torch.allclose(softmax.dense(logits, 0.5), torch.softmax(2 * logits, -1))


def test_the_largest_are_k_even_among_equals() -> None:
    g = torch.full((3, 4), 0.25)
    assert softmax.largest(g, 2).sum(-1).tolist() == [2, 2, 2]
    assert softmax.largest(torch.tensor([0.1, 0.7, 0.2]), 1).tolist() == [False, True, False]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_kept_gates_keep_their_value_and_shared_ones_sum_to_one(k: int) -> None:
    g = softmax.dense(normal(6, 4))
    mask = softmax.largest(g, k)
    assert torch.equal(softmax.kept(g, mask)[mask], g[mask])
    assert not softmax.kept(g, mask)[~mask].any()
    assert torch.allclose(softmax.shared(g, mask).sum(-1), torch.ones(6, dtype=torch.float64))
    assert not softmax.shared(g, mask)[~mask].any()
    assert torch.equal(softmax.kept(g, mask), g) == (k == 4)
