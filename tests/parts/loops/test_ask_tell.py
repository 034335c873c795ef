"""The searches: exact seeds, exact calls, invariance to the scale of losses, and problems with known minima."""

from collections.abc import Callable

import numpy as np
import pytest

from lorakit.parts.loops import ask_tell
from lorakit.parts.loops.ask_tell import CMA, Algorithm, Fireworks, Search, Vector, search

KINDS: tuple[Algorithm, ...] = ("cma", "fireworks")
RNG = np.random.default_rng(0)
TARGET = RNG.normal(size=20)
SCALES = np.logspace(0, 1, 20)


def quadratic(z: Vector) -> float:
    return float((SCALES * (z - TARGET) ** 2).sum())


def minimized(found: Search, loss: Callable[[Vector], float], generations: int) -> float:
    for _ in range(generations):
        candidates = found.ask()
        found.tell(np.array([loss(z) for z in candidates]))
    return quadratic(found.mean)


def test_cma_minimizes_a_quadratic_in_20_dimensions() -> None:
    assert minimized(CMA(20, 1.0, 12, 0), quadratic, 600) < 1e-6


def test_fireworks_get_close_on_the_same_budget_and_random_search_does_not() -> None:
    found = minimized(Fireworks(20, 1.0, 12, 0, generations=600), quadratic, 600)
    drawn = np.random.default_rng(1).normal(size=(7200, 20))
    assert found < 0.1 * min(quadratic(z) for z in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_and_the_same_losses_lead_to_the_same_state(kind: Algorithm) -> None:
    """This is how a run resumes."""
    one, two, other = (search(kind, 6, 1.0, 8, seed, generations=20) for seed in (3, 3, 4))
    for _ in range(5):
        a, b, c = one.ask(), two.ask(), other.ask()
        assert (a == b).all()
        assert (a != c).any()
        for each, z in ((one, a), (two, b), (other, c)):
            each.tell(np.array([quadratic(np.resize(v, 20)) for v in z]))


@pytest.mark.parametrize("kind", KINDS)
def test_numpys_global_generator_is_not_touched(kind: Algorithm) -> None:
    np.random.seed(5)
    want = np.random.rand()
    np.random.seed(5)
    found = search(kind, 6, 1.0, 8, 3, generations=5)
    found.ask()
    found.tell(np.arange(8.0))
    assert np.random.rand() == want


def test_cma_sees_the_order_of_losses_only() -> None:
    """A monotone transform of the loss gives the same candidates, bit for bit; fireworks weigh losses and do not have this."""
    plain, squashed = CMA(6, 1.0, 8, 0), CMA(6, 1.0, 8, 0)
    for _ in range(8):
        a, b = plain.ask(), squashed.ask()
        assert (a == b).all()
        losses = np.array([quadratic(np.resize(z, 20)) for z in a])
        plain.tell(losses)
        squashed.tell(np.log1p(losses) ** 3)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_are_not_finite_are_the_worst(kind: Algorithm) -> None:
    found = search(kind, 6, 1.0, 8, 0, generations=50)
    for _ in range(50):
        z = found.ask()
        losses = (z**2).sum(1)
        losses[0] = np.nan
        losses[1] = np.inf
        found.tell(losses)
    assert np.isfinite(found.mean).all()
    assert (found.mean**2).sum() < 6


@pytest.mark.parametrize("population", [4, 5, 9, 20])
def test_fireworks_ask_for_exactly_the_population(population: int) -> None:
    found = Fireworks(6, 1.0, population, 0, generations=10)
    for _ in range(10):
        z = found.ask()
        assert z.shape == (population, 6)
        found.tell((z**2).sum(1))


def test_the_best_firework_survives() -> None:
    found, best = Fireworks(6, 1.0, 8, 0, generations=30), np.inf
    for _ in range(30):
        z = found.ask()
        losses = (z**2).sum(1)
        best = min(best, losses.min())
        found.tell(losses)
        assert (found.mean**2).sum() == best


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"lorakit\[search\]"):
        ask_tell.CMA(4, 1.0, 4, 0)
