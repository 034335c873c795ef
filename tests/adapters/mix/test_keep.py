"""What is kept, against a sort: whatever the blocks, with equal entries, zeros and numbers that have no smaller one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.adapters.mix import keep
from lorakit.adapters.mix.keep import Draw, Rows, trim
from lorakit.core.errors import BadParameter

DRAW = Draw(0, torch.tensor(0))
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.1, 1e-45, -1e-45, 3e-39, 1e38, float("inf")])


def kept(W: Tensor, density: float) -> Tensor:
    """The k largest in magnitude, the first of equal ones."""
    order = W.abs().flatten().sort(descending=True, stable=True).indices[: int(density * W.numel() + 1e-9)]
    out = torch.zeros(W.numel())
    out[order] = W.flatten()[order]
    return out.view_as(W)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 5),
    entries=st.lists(VALUES, min_size=20, max_size=20),
    density=st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]),
    block=st.sampled_from([1, 7, 2**16]),
)
def test_trim_is_a_sort(rows: int, entries: list[float], density: float, block: int) -> None:
    W = torch.tensor(entries)[: rows * (20 // rows)].view(rows, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep, "BLOCK", block)
        found = torch.cat(list(trim(Rows(W), DRAW, density=density)))
    assert torch.equal(found, kept(W, density))


def test_nothing_to_keep_is_an_error() -> None:
    with pytest.raises(BadParameter, match="density=0.01 keeps none of the 20 entries"):
        list(trim(Rows(torch.ones(4, 5)), DRAW, density=0.01))


@pytest.mark.parametrize("scale", [1.0, -3.7])
def test_factors_are_trimmed_as_their_product(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "BLOCK", 100)
    rng = torch.Generator().manual_seed(0)
    B, A = torch.randn(40, 3, generator=rng), torch.randn(3, 30, generator=rng)
    W = torch.cat(list(Rows(B, A, scale).blocks()))
    assert torch.allclose(W, scale * B @ A, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat(list(trim(Rows(B, A, scale), DRAW, density=0.3))), kept(W, 0.3))
