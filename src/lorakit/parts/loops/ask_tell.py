"""Search without gradients: ask for candidates, tell their losses. CMA-ES is the `cma` package's; fireworks are the enhanced ones.

A search draws from its own generator alone, so asking and telling the same losses again from its seed leads to the same state: that is how
a run resumes, without a pickle.
"""

import math
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lorakit.core.errors import MissingExtra

Vector = NDArray[np.float64]
Vectors = NDArray[np.float64]
Algorithm = Literal["cma", "fireworks"]


class Search(Protocol):
    """A minimizer over R^d that starts at zero."""

    def ask(self) -> Vectors:
        """Candidates, [population, d]."""

    def tell(self, losses: Vector) -> None:
        """Their losses, in order. A loss that is not finite counts as the worst."""

    @property
    def mean(self) -> Vector:
        """Where the search stands."""


class CMA:
    """CMA-ES with mean 0 and step size `sigma` (Hansen, arXiv:1604.00772). Only the order of losses matters to it."""

    def __init__(self, d: int, sigma: float, population: int, seed: int) -> None:
        try:
            import cma
        except ImportError:
            raise MissingExtra("cma", "search") from None
        rng = np.random.default_rng(seed)
        options: dict[str, Any] = {"popsize": population, "randn": lambda *shape: rng.standard_normal(shape), "seed": np.nan, "verbose": -9}
        self.es = cma.CMAEvolutionStrategy(np.zeros(d), sigma, options)
        self.asked: Any = []

    def ask(self) -> Vectors:
        self.asked = self.es.ask()
        return np.asarray(self.asked)

    def tell(self, losses: Vector) -> None:
        self.es.tell(self.asked, _finite(losses))

    @property
    def mean(self) -> Vector:
        return np.asarray(self.es.mean)


class Fireworks:
    """The enhanced fireworks algorithm (Zheng, Janecek, Tan, 2013): good fireworks have many sparks close by, bad ones few far away, the
    amplitude has a floor that falls over the run, some sparks are mutated along the line to the best, and the best survives."""

    def __init__(self, d: int, sigma: float, population: int, seed: int, *, generations: int, fireworks: int = 5, mutants: int = 2) -> None:
        self.rng, self.d, self.population, self.generations = np.random.default_rng(seed), d, population, max(1, generations)
        self.n, self.mutants, self.sigma = min(fireworks, population), min(mutants, max(0, population - 1)), sigma
        self.at, self.losses, self.asked, self.t = np.zeros((0, d)), np.zeros(0), np.zeros((0, d)), 0

    def ask(self) -> Vectors:
        if not len(self.at):
            self.asked = self.rng.normal(0, self.sigma, (self.population, self.d))
        else:
            sparks = [self._spark(i) for i in range(len(self.at)) for _ in range(int(self._shares()[i]))]
            self.asked = np.stack([*sparks, *(self._mutant() for _ in range(self.mutants))])
        return self.asked

    def tell(self, losses: Vector) -> None:
        at, found = np.concatenate([self.at, self.asked]), np.concatenate([self.losses, _finite(losses)])
        best = int(found.argmin())
        others = np.delete(np.arange(len(found)), best)
        kept = np.concatenate([[best], self.rng.choice(others, min(self.n - 1, len(others)), replace=False)]).astype(int)
        self.at, self.losses, self.t = at[kept], found[kept], self.t + 1

    @property
    def mean(self) -> Vector:
        return self.at[int(self.losses.argmin())] if len(self.at) else np.zeros(self.d)

    def _shares(self) -> Vector:
        """Sparks of each firework: more for the better, at least one where there is room, `population` − mutants in all."""
        room = self.population - self.mutants
        weight = self.losses.max() - self.losses + 1e-12
        cuts = np.round(np.cumsum(weight / weight.sum()) * room).astype(int)
        return np.diff(cuts, prepend=0)

    def _spark(self, i: int) -> Vector:
        gap = self.losses - self.losses.min() + 1e-12
        start, end = self.sigma, 1e-3 * self.sigma
        t = min(self.t, self.generations)
        floor = start - (start - end) * math.sqrt((2 * self.generations - t) * t) / self.generations
        amplitude = max(floor, self.sigma * gap[i] / gap.sum())
        moved = self.rng.random(self.d) < 0.5
        found: Vector = self.at[i] + moved * amplitude * self.rng.uniform(-1, 1, self.d)
        return found

    def _mutant(self) -> Vector:
        """Along the line from some firework to the best."""
        some = self.at[self.rng.integers(len(self.at))]
        moved = self.rng.random(self.d) < 0.5
        found: Vector = some + moved * (self.mean - some) * self.rng.normal(1, 1)
        return found


def search(algorithm: Algorithm, d: int, sigma: float, population: int, seed: int, *, generations: int) -> Search:
    """A fresh search of this kind."""
    if algorithm == "cma":
        return CMA(d, sigma, population, seed)
    return Fireworks(d, sigma, population, seed, generations=generations)


def _finite(losses: Vector) -> Vector:
    worst = losses[np.isfinite(losses)].max(initial=0.0)
    return np.where(np.isfinite(losses), losses, worst + 1)
