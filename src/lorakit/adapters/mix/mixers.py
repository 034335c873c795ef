"""The mixers by name: what each does with the adapters' changes at one site. A function's signature is its options.

    linear, average, task_arithmetic, slerp      Σ w ΔW with weights of four kinds: exact at low rank
    regmean                                      Σ ΔW_t G_t (Σ G)⁻¹: exact at low rank, too; needs the Gram matrices of the tasks' inputs
    svd                                          linear, cut to a rank
    ties, dare_linear, dare_ties, della, della_linear, magnitude_prune, fisher
                                                 entry by entry: their results have no low rank, unless the space gives them one (spaces.py)

One adapter with weight 1 comes out as it went in, for every mixer at density 1. Where a mixer takes a weighted mean (`average`, `slerp`,
`regmean`, `fisher`, and what elects signs), weights count relative to each other only; elsewhere each multiplies its adapter.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import pydantic
import torch
from pydantic import Field
from torch import Tensor

from lorakit.adapters.mix.keep import Keep, drop, everything, graded, trim
from lorakit.adapters.mix.merge import Merge, Vote, elected, mean, total
from lorakit.adapters.update import inner, norm
from lorakit.core.checked import expected
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter, did_you_mean

Parts = Sequence[Factors | None]
"""Each adapter's update at one site; None where it has none, which counts as zero."""
Stats = Sequence[Tensor | None]
"""Each adapter's statistic at one site."""
Given = tuple[Parts, Sequence[float], Stats]
Prepare = Callable[[Parts, Sequence[float], Stats], Given]
"""(updates, weights, statistics) of a site -> those that are put together there."""

Density = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(allow_inf_nan=False)]


def as_given(parts: Parts, weights: Sequence[float], stats: Stats) -> Given:
    """Nothing changed."""
    return parts, weights, stats


class Rule(NamedTuple):
    """What a mixer does at a site."""

    prepare: Prepare = as_given
    keep: Keep = everything
    merge: Merge = total
    scale: float = 1.0
    """Of the result."""
    rank: int | None = None
    """To which it is cut, or None; 0: the largest rank among the adapters."""
    needs: str | None = None
    """The statistic of every adapter's task that it cannot do without."""

    @property
    def linear(self) -> bool:
        """Whether it is a weighted sum of updates, and therefore of low rank."""
        return self.keep is everything and self.merge is total


@dataclass(frozen=True)
class Mixer:
    """A registered mixer."""

    name: str
    make: Callable[..., Rule]
    paper: str
    survey: str
    unit: bool
    """Whether weights are 1 where none are given, and not 1/N."""

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults."""
        return {name: p.default for name, p in inspect.signature(self.make).parameters.items()}

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.make) or "").split("\n")[0]

    def rule(self, **options: Any) -> Rule:
        """With these options. Raises BadParameter."""
        for key in options:
            if key not in self.options:
                raise BadParameter(f"{self.name} has no option {key!r}. {did_you_mean(key, self.options)}".rstrip())
        try:
            return pydantic.validate_call(self.make)(**options)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise BadParameter(f"{self.name}: {first['loc'][0]}={first['input']!r}: expected {expected(first)}") from None


MIXERS: dict[str, Mixer] = {}


def mixer(name: str, *, paper: str, survey: str = "", unit: bool = False) -> Callable[[Callable[..., Rule]], Callable[..., Rule]]:
    """Register a mixer."""

    def register(make: Callable[..., Rule]) -> Callable[..., Rule]:
        MIXERS[name] = Mixer(name, make, paper, survey, unit)
        return make

    return register


def get_mixer(name: str) -> Mixer:
    """The mixer of this name. Raises BadParameter."""
    if name not in MIXERS:
        raise BadParameter(f"no mixer is called {name!r}. {did_you_mean(name, MIXERS)}")
    return MIXERS[name]


# ------------------------------------------------------------------------------------------------------------- exact at low rank
@mixer("linear", paper="arXiv:2212.04089", survey="4.1")
def linear() -> Rule:
    """Σ w ΔW, exactly, of rank Σ r: what PEFT calls `cat`."""
    return Rule()


@mixer("task_arithmetic", paper="arXiv:2212.04089", survey="4.1", unit=True)
def task_arithmetic(scale: Scale = 0.3) -> Rule:
    """scale · Σ w ΔW; a negative weight unlearns."""
    return Rule(scale=scale)


@mixer("average", paper="arXiv:2402.15414", survey="4.1")
def average() -> Rule:
    """Σ w ΔW / Σ w."""
    return Rule(_normalized)


@mixer("svd", paper="arXiv:2212.04089")
def svd(rank: Annotated[int, Field(ge=0)] = 0) -> Rule:
    """Σ w ΔW, cut to a rank by its singular values; rank 0: the largest of the adapters."""
    return Rule(rank=rank)


@mixer("slerp", paper="")
def slerp() -> Rule:
    """On the arc from the first ΔW to the second, at w₂ / (w₁ + w₂) of their angle, site by site."""
    return Rule(_on_arc)


@mixer("regmean", paper="arXiv:2212.09849", survey="4.1", unit=True)
def regmean(off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9, ridge: Annotated[float, Field(ge=0)] = 1e-6) -> Rule:
    """The ΔW whose outputs are nearest to every adapter's on its own task's inputs, weighted; G's other entries times `off_diagonal`."""
    return Rule(partial(_regression, off_diagonal=off_diagonal, ridge=ridge), needs="gram")


# ---------------------------------------------------------------------------------------------------------------- entry by entry
@mixer("magnitude_prune", paper="arXiv:2306.01708")
def magnitude_prune(density: Density = 0.2) -> Rule:
    """Σ w ΔW of each one's largest entries."""
    return Rule(keep=partial(trim, density=density))


@mixer("ties", paper="arXiv:2306.01708", unit=True)
def ties(density: Density = 0.2, vote: Vote = "total", scale: Scale = 1.0) -> Rule:
    """Trim each to its largest entries, elect a sign for every entry, average those that have it."""
    return Rule(keep=partial(trim, density=density), merge=partial(elected, vote=vote), scale=scale)


@mixer("dare_linear", paper="arXiv:2311.03099")
def dare_linear(density: Density = 0.2) -> Rule:
    """Σ w ΔW of entries drawn by chance and scaled by 1/density."""
    return Rule(keep=partial(drop, density=density))


@mixer("dare_ties", paper="arXiv:2311.03099", unit=True)
def dare_ties(density: Density = 0.2, vote: Vote = "total", scale: Scale = 1.0) -> Rule:
    """Entries drawn by chance and scaled by 1/density, then signs elected as in ties."""
    return Rule(keep=partial(drop, density=density), merge=partial(elected, vote=vote), scale=scale)


@mixer("della_linear", paper="arXiv:2406.11617")
def della_linear(density: Density = 0.5, epsilon: Density = 0.15) -> Rule:
    """Σ w ΔW of entries drawn with probabilities that grow with their rank in the row."""
    return Rule(keep=partial(graded, density=density, epsilon=epsilon))


@mixer("della", paper="arXiv:2406.11617", unit=True)
def della(density: Density = 0.5, epsilon: Density = 0.15, vote: Vote = "total", scale: Scale = 1.0) -> Rule:
    """Entries drawn with probabilities that grow with their rank in the row, then signs elected as in ties."""
    return Rule(keep=partial(graded, density=density, epsilon=epsilon), merge=partial(elected, vote=vote), scale=scale)


@mixer("fisher", paper="arXiv:2111.09832", survey="4.1", unit=True)
def fisher(floor: Annotated[float, Field(ge=0)] = 1e-6) -> Rule:
    """Σ w F∘ΔW / Σ w F, with F the diagonal Fisher information of W + ΔW on each adapter's own task, plus `floor` of its mean."""
    return Rule(partial(_floored, floor=floor), merge=mean, needs="fisher")


# -------------------------------------------------------------------------------------------------------------------- the weights
def _normalized(parts: Parts, weights: Sequence[float], stats: Stats) -> Given:
    whole = sum(weights)
    if math.isclose(whole, 0, abs_tol=1e-12):
        raise BadParameter(f"weights {list(weights)} sum up to 0, and an average divides by it; how='linear' takes weights as they are")
    return parts, [w / whole for w in weights], stats


def _on_arc(parts: Parts, weights: Sequence[float], stats: Stats) -> Given:
    if len(parts) > 2:
        raise BadParameter(f"slerp goes from one adapter to another; {len(parts)} were given. For more take how='average'")
    _, weights, _ = _normalized(parts, weights, stats)
    one, other = parts[0], parts[-1]
    if len(parts) < 2 or one is None or other is None or not (size := norm(one) * norm(other)):
        return parts, weights, stats
    angle = math.acos(max(-1.0, min(1.0, inner(one, other) / size)))
    if math.sin(angle) < 1e-6:  # on one line there is no arc
        return parts, weights, stats
    return parts, [math.sin(w * angle) / math.sin(angle) for w in weights], stats


def _floored(parts: Parts, weights: Sequence[float], stats: Stats, *, floor: float) -> Given:
    """Where nobody's task says anything, all count alike."""
    least = floor * torch.stack([F.double().mean() for F in stats if F is not None]).mean()
    return parts, weights, [None if F is None else F + least for F in stats]


def _regression(parts: Parts, weights: Sequence[float], stats: Stats, *, off_diagonal: float, ridge: float) -> Given:
    """A_t -> A_t w_t G_t (Σ w G)⁻¹: W itself cancels, as Σ G_t (Σ G)⁻¹ = 1 (arXiv:2212.09849, equation 2)."""
    least = ridge * torch.stack([G.diagonal().double().mean() for G in stats if G is not None]).mean()
    whole = torch.zeros((), dtype=torch.float64)
    for G, w in zip(stats, weights, strict=True):
        whole = whole if G is None else whole + _damped(G, w, off_diagonal, least)  # one at a time: in fp64 they are large
    root, failed = torch.linalg.cholesky_ex(whole)
    if failed:
        raise BadParameter(
            f"the weighted sum of the tasks' Gram matrices is not positive; ridge={ridge} is too small, or a weight is negative"
        )
    turned = [
        None if f is None or G is None else _turned(f, _damped(G, w, off_diagonal, least), root)
        for f, G, w in zip(parts, stats, weights, strict=True)
    ]
    return turned, [1.0] * len(parts), stats


def _turned(f: Factors, G: Tensor, root: Tensor) -> Factors:
    """A G (root rootᵀ)⁻¹ in A's place."""
    return f._replace(A=torch.cholesky_solve(G @ f.A.double().T, root).T)


def _damped(G: Tensor, w: float, off_diagonal: float, least: Tensor) -> Tensor:
    """w G, in fp64. The ridge is on each, not on their sum: a direction that nobody's inputs have is averaged, not forgotten."""
    diagonal = G.diagonal().double()
    damped = G.double() * (w * off_diagonal)
    damped.diagonal().copy_(w * (diagonal + least))
    return damped
