"""Random starts: distributions, zeros, and the CPU draw."""

import math

import pytest
import torch

from lorakit import BadParameter, Site
from lorakit.core import random
from lorakit.core.base import base_of
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.scale import Rank
from lorakit.parts.inits.random import Gaussian, Kaiming, OneSided

SITE = Site("w", "linear", 256, 192, None, "other")
EMBEDDING = Site("e", "embedding", 256, 192, None, "embed")


def started(init: object, site: Site = SITE, *, r: int = 64, dtype: torch.dtype = torch.float32) -> LowRank:
    spec = LowRankSpec(Rank.of(r, 8.0), gate=True, train=("A", "B", "g"))
    delta = spec.build(site, pool=None, dtype=dtype, device=torch.device("cpu"))
    host = torch.nn.Linear(256, 192) if site is SITE else torch.nn.Embedding(256, 192)
    init(delta, base_of(host), site, random.generator(0, site.name))
    return delta


def std(tensor: torch.Tensor) -> float:
    return tensor.std().item()


def test_kaiming() -> None:
    delta = started(Kaiming())
    bound = 1 / math.sqrt(256)
    assert delta.A.abs().max() <= bound
    assert std(delta.A) == pytest.approx(bound / math.sqrt(3), rel=0.02), "uniform on ± 1/√d_in"
    assert not delta.B.any()
    swapped = started(Kaiming(), EMBEDDING)
    assert not swapped.A.any()
    assert std(swapped.B) == pytest.approx(1, rel=0.02)
    frozen = started(Kaiming(embedding="A"), EMBEDDING)
    assert not frozen.B.any()
    assert std(frozen.A) == pytest.approx(1, rel=0.02)


def test_one_sided() -> None:
    a, b = started(OneSided("A")), started(OneSided("B"))
    assert std(a.A) == pytest.approx(1 / math.sqrt(256), rel=0.02)
    assert not a.B.any()
    assert std(b.B) == pytest.approx(1 / math.sqrt(64), rel=0.02)
    assert not b.A.any()
    with pytest.raises(BadParameter, match="expected 'A'"):
        OneSided("C")  # type: ignore[arg-type]


def test_gaussian() -> None:
    delta = started(Gaussian())
    assert std(delta.A) == pytest.approx(0.02, rel=0.02)
    assert std(delta.B) == pytest.approx(0.02, rel=0.02)
    assert not delta.g.any()
    assert not torch.equal(delta.A[:, :192].T, delta.B)


def test_a_wider_precision_gets_the_same_numbers() -> None:
    for init in (Kaiming(), OneSided("A"), OneSided("B"), Gaussian()):
        narrow, wide = started(init), started(init, dtype=torch.float64)
        assert torch.equal(narrow.A.double(), wide.A)
        assert torch.equal(narrow.B.double(), wide.B)
