"""L12: the same seed gives the same bits. L13: four steps are two, a checkpoint, and two more."""

import pytest
import torch

from lorakit import Adapted, list_methods
from lorakit.core.events import Calibrated
from lorakit.core.site import ROOT
from tests.laws.steps import Run
from tests.laws.subject import attached, base, batch, has_dropout, logits, provides, same_bits, small


def starts(name: str, *, seed: int = 0, sites: object = "all-linear") -> Adapted:
    """A start that tasks share has a seed of its own."""
    return attached(base(), small(name, sites=sites, dropout=0.25, start_seed=seed), seed=seed)


def check_L12(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = starts(name)
    assert torch.equal(torch.get_rng_state(), state), "attach draws from the global generator"
    torch.manual_seed(2)
    b, part, other = starts(name), starts(name, sites="qv"), starts(name, seed=1)
    first, again, some, changed = (x.tensors("default") for x in (a, b, part, other))
    assert all(same_bits(first[k], again[k]) for k in first)
    assert some
    pooled = f"{ROOT}."  # what sites share may depend on which they are
    sole = {k: t for k, t in first.items() if not k.startswith(pooled)}
    assert all(same_bits(sole[k], some[k]) for k in some if k in sole), "a site's start depends on which others are adapted"
    flat = all((t == t.flatten()[:1]).all() for t in sole.values())  # zeros, or another constant
    found = isinstance(small(name).init, Calibrated) or "anchor" in provides(small(name))  # data, weights, an exact SVD draw nothing
    if (a.branches() or a.shared("default")) and not flat and not found:
        assert any(not torch.equal(first[k], changed[k]) for k in first)
    drawn = [t for k, t in first.items() if t.count_nonzero() and k.endswith("q_proj.A")]
    assert all(not torch.equal(x, y) for i, x in enumerate(drawn) for y in drawn[:i]), "two sites drew the same numbers"
    losses = []
    for adapted in (a, b):
        torch.manual_seed(len(losses))  # masks follow from (seed, step), never from here
        losses.append(torch.stack([Run(adapted, total=8).step() for _ in range(2)]))
    assert same_bits(*losses)
    assert all(same_bits(x, b.tensors("default")[k]) for k, x in a.tensors("default").items())


def check_L12_masks(name: str) -> None:
    """Masks differ by step, seed and site, and repeat by (seed, step)."""
    adapted = starts(name)
    Run(adapted, total=8).steps(2)
    out: dict[tuple[int, int], torch.Tensor] = {}
    for step, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        with adapted.given(step=step, seed=seed):
            now = logits(adapted.model.train(), batch())
        for key, before in out.items():
            assert same_bits(now, before) == (key == (step, seed) or not has_dropout(name)), (key, (step, seed))
        out[step, seed] = now


def check_L13(name: str) -> None:
    whole = Run(starts(name), total=6).steps(4)
    half = Run(starts(name), total=6).steps(2)
    saved = half.state()
    resumed = Run(starts(name, seed=0), total=6).restore(saved)
    assert whole.state() != resumed.state()
    resumed.steps(2)
    for run in (whole, resumed):
        run.finish()
    want, got = whole.adapted.tensors("default"), resumed.adapted.tensors("default")
    assert all(same_bits(got[k], want[k]) for k in want)
    a, b = (torch.cat([torch.zeros(0), *(v.flatten() for s in r.optimizer.state.values() for v in s.values())]) for r in (whole, resumed))
    assert same_bits(a, b)
    assert whole.index == resumed.index == 4


@pytest.mark.parametrize("name", list_methods())
def test_L12(name: str) -> None:
    check_L12(name)


@pytest.mark.parametrize("name", list_methods())
def test_L12_masks(name: str) -> None:
    check_L12_masks(name)


@pytest.mark.parametrize("name", list_methods())
def test_L13(name: str) -> None:
    check_L13(name)
