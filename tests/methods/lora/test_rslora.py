"""rsLoRA's acceptance properties (arXiv:2312.03732): the update keeps its size as the rank grows."""

import math

import pytest
import torch
from torch import Tensor

from lorakit import Adapted, attach, get_method
from tests.laws.subject import base, batch, far, logits, subject
from tests.methods.tools import layer, normal

RANKS = (4, 16, 64, 256, 512)
WIDTH = 1024


def at(name: str, r: int) -> Adapted:
    return layer(get_method(name, r=r, alpha=16.0, sites="w"), d_in=WIDTH, d_out=WIDTH, dtype=torch.float32)


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def sizes(name: str) -> tuple[list[float], list[float], list[float]]:
    """By rank: ΔW x with B of unit entries; ∂L/∂x through it; ΔW x after one SGD step on that x. Means over inputs."""
    drawn, backward, stepped = [], [], []
    xs, gs = normal(128, WIDTH, dtype=torch.float32), normal(128, WIDTH, seed=1, dtype=torch.float32)
    for r in RANKS:
        (branch,) = at(name, r).branches()
        delta, found = branch.delta, []
        for x, g in zip(xs, gs, strict=True):
            (grad,) = torch.autograd.grad((delta(x, None) * g).sum(), delta.B)
            with torch.no_grad():
                delta.B.copy_(-grad)
                found.append(rms(delta(x, None)))
        stepped.append(sum(found) / len(found))
        with torch.no_grad():
            delta.B.copy_(normal(WIDTH, r, seed=2))
            drawn.append(rms(delta(xs, None)))
            backward.append(rms(delta.s * (gs @ delta.B) @ delta.A))
    return drawn, backward, stepped


def test_activations_and_gradients_keep_their_size_from_rank_4_to_512() -> None:
    for measured in sizes("rslora"):
        assert max(measured) / min(measured) < 1.5, measured


def test_with_alpha_over_r_they_fade() -> None:
    drawn, backward, stepped = sizes("lora")
    assert drawn[0] / drawn[-1] == pytest.approx(math.sqrt(512 / 4), rel=0.2), "as 1/√r for a given B"
    assert backward[0] / backward[-1] == pytest.approx(math.sqrt(512 / 4), rel=0.2)
    assert stepped[0] / stepped[-1] == pytest.approx(512 / 4, rel=0.2), "as 1/r for a B that is learned"


def test_it_is_lora_with_alpha_folded() -> None:
    for r in (4, 8, 16):
        adapted = subject("rslora", r=r, alpha=6.0)
        folded = attach(base(), get_method("lora", r=r, alpha=6.0 * math.sqrt(r)))
        folded.load_tensors("default", adapted.tensors("default"))
        assert far(logits(folded.model, batch()), logits(adapted.model, batch())) < 1e-6


def test_the_scale_follows_each_sites_rank() -> None:
    adapted = subject("rslora", r=4, alpha=8.0, rank_pattern={"v_proj": 16}, sites="qv")
    assert {(b.site.role, b.delta.s) for b in adapted.branches()} == {("q", 4.0), ("v", 2.0)}
