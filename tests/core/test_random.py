"""Randomness that replays: the mask op and the init generators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit import attach, get_method
from lorakit.core import random
from lorakit.data.tiny import tiny_model
from lorakit.ops import mask as mask_ops


def key(seed: int = 0, step: int = 0) -> Tensor:
    return torch.tensor([seed, step], dtype=torch.int64)


def mask(shape: tuple[int, ...] = (64, 1024), *, seed: int = 0, step: int = 0, site: int = 1, p: float = 0.25) -> Tensor:
    return random.dropout_mask(torch.empty(shape, dtype=torch.float64), key(seed, step), torch.tensor(site), p)


def test_opcheck() -> None:
    for like in (torch.randn(3, 5), torch.randn(7, dtype=torch.float64), torch.randn(4, 6).T, torch.randn(2, 3, dtype=torch.bfloat16)):
        torch.library.opcheck(mask_ops.keep_mask, (like, key(), torch.tensor(3), 0.25))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=3), st.floats(0, 1, exclude_max=True), st.integers(-(2**63), 2**63 - 1))
def test_shape_values_and_replay(shape: list[int], p: float, seed: int) -> None:
    m = mask(tuple(shape), p=p, seed=seed)
    assert m.shape == torch.Size(shape)
    kept = mask_ops.STEPS / (mask_ops.STEPS - min(round(p * mask_ops.STEPS), mask_ops.STEPS - 1))
    assert set(m.flatten().tolist()) <= {0.0, kept}
    assert torch.equal(m, mask(tuple(shape), p=p, seed=seed))


@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.05, 0.1, 0.5, 0.9, 0.998])
def test_the_share_dropped_is_p_and_the_mean_one(p: float) -> None:
    m = mask((256, 1024), p=p)
    n = m.numel()
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs((m == 0).float().mean().item() - p) <= 5 * deviation
    assert abs(m.double().mean().item() - 1) <= 5 * deviation / (1 - p) + 1e-6
    if p == 0:
        assert torch.equal(m, torch.ones_like(m))


def test_masks_are_independent_over_step_seed_site_and_position() -> None:
    base = (mask(p=0.5) != 0).double() - 0.5
    for other in (mask(p=0.5, step=1), mask(p=0.5, seed=1), mask(p=0.5, site=2), mask(p=0.5, seed=1, step=-1)):
        correlation = (base * ((other != 0).double() - 0.5)).mean() * 4
        assert abs(correlation) < 5 / math.sqrt(base.numel())
    neighbors = (base[:, 1:] * base[:, :-1]).mean() * 4
    eighth = (base[:, 8:] * base[:, :-8]).mean() * 4  # eight draws come from one word
    below = (base[1:] * base[:-1]).mean() * 4
    assert max(abs(neighbors), abs(eighth), abs(below)) < 5 / math.sqrt(base.numel())


def test_seed_and_step_do_not_trade_places() -> None:
    assert not torch.equal(mask(seed=1, step=2), mask(seed=2, step=1))
    assert len({random.mixed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}) == 512


GOLDEN = {
    "mixed(0, 0, 0)": 1279368494785126216,
    "mixed(1, 2, 3)": 3851293329796251419,
    "stream": 4115701589701346651,
    "mask": [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0],
    "generator": [179, 818, 186, 988],
}


def test_the_numbers_of_this_version_are_those_of_every_version() -> None:
    assert random.mixed(0, 0, 0) == GOLDEN["mixed(0, 0, 0)"]
    assert random.mixed(1, 2, 3) == GOLDEN["mixed(1, 2, 3)"]
    assert int(random.stream("model.layers.0.self_attn.q_proj")) == GOLDEN["stream"]
    assert mask((12,), p=0.5).ne(0).int().tolist() == GOLDEN["mask"]
    assert torch.randint(1000, (4,), generator=random.generator(0, "a")).tolist() == GOLDEN["generator"]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.999])
def test_the_bits_are_those_of_the_definition(p: float) -> None:
    """Counted in Python's integers."""
    word = (1 << 64) - 1

    def output(start: int, n: int) -> int:
        z = (start + n * 0x9E3779B97F4A7C15) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    number, (whole, part) = random.mixed(3, 4, 5), divmod(round(p * 65536), 256)
    limits = [whole + ((output(number ^ 0x5851F42D4C957F2D, row + 1) & 255) < part) for row in range(7)]
    kept = [output(number, i // 8 + 1) >> 8 * (i % 8) & 255 >= limits[i // 13] for i in range(7 * 13)]
    assert len(set(limits)) == 2
    assert mask_ops.keep_mask(torch.empty(7, 13), key(3, 4), torch.tensor(5), p).flatten().tolist() == kept


def test_dropout_passes_gradients_through_its_mask() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    y = random.dropout(x, key(), torch.tensor(1), 0.25)
    (grad,) = torch.autograd.grad(y.sum(), x)
    m = random.dropout_mask(x.detach(), key(), torch.tensor(1), 0.25)
    assert torch.equal(grad, m)
    assert torch.equal(y, x * m)
    assert 0 < (m == 0).sum() < m.numel()


def test_dropout_is_on_the_adapters_input_in_training_only() -> None:
    model = tiny_model("llama")
    adapted = attach(model, get_method("lora", dropout=0.5, sites="q_proj"))
    (first, _) = adapted.branches()
    with torch.no_grad():
        first.delta.B.normal_()
        x, y = torch.randn(4, 32), torch.zeros(4, 32)
        quiet = first(x, y, adapted.context)
        torch.testing.assert_close(quiet, x @ first.weight().T)
        first.train()
        with adapted.given(step=5):
            noisy = first(x, y, adapted.context)
        m = random.dropout_mask(x, key(0, 5), random.stream(first.site.name), 0.5)
        torch.testing.assert_close(noisy, (x * m) @ first.weight().T)


def test_outside_given_every_training_forward_draws_a_new_mask_from_torchs_generator() -> None:
    model = tiny_model("llama").train()
    adapted = attach(model, get_method("lora", dropout=0.5))
    with torch.no_grad():
        for p in adapted.params().by_role("B"):
            p.tensor.normal_()
        ids = torch.tensor([[5, 6, 7]])
        torch.manual_seed(3)
        first, second = model(ids).logits, model(ids).logits
        torch.manual_seed(3)
        again = model(ids).logits
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_each_site_has_its_generator() -> None:
    a, b, c = (torch.randn(5, generator=random.generator(*args)) for args in ((0, "x"), (0, "y"), (1, "x")))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(a, torch.randn(5, generator=random.generator(0, "x")))
