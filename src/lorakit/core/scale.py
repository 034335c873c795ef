"""The one scale resolver: (r, s) of a site from r, alpha, the rule and the patterns. Train, merge, export, mix and serve all ask here.

linear    s = alpha / r             LoRA, arXiv:2106.09685
sqrt      s = alpha / sqrt(r)       rsLoRA, arXiv:2312.03732
guarded   s = alpha / (r + 1e-5)    AdaLoRA's code; r is the initial rank and never changes when ranks are pruned
constant  s = alpha                 modules that have a scale of their own (arXiv:2110.04366)
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.core.site import Site

T = TypeVar("T", int, float)

RULES: dict[str, Callable[[int, float], float]] = {
    "linear": lambda r, alpha: alpha / r,
    "sqrt": lambda r, alpha: alpha / math.sqrt(r),
    "guarded": lambda r, alpha: alpha / (r + 1e-5),
    "constant": lambda r, alpha: alpha,
}


@dataclass(frozen=True)
class Rank:
    """r and alpha, by site: a pattern is a regular expression that must match the end of a site's name, on a dot."""

    r: int
    alpha: float
    rule: str = "linear"
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(
        cls,
        r: int,
        alpha: float,
        *,
        rule: str = "linear",
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
    ) -> "Rank":
        """Check and freeze what the user typed. Raises BadParameter."""
        for name, value in [("r", r), *(rank_pattern or {}).items()]:
            if value < 1:
                raise BadParameter(f"rank {name}={value} is not possible; r must be at least 1")
        return cls(r, alpha, rule, frozen(rank_pattern), frozen(alpha_pattern))

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BadParameter for a rank over its matrix and for a pattern that matches none of the sites."""
        for site in sites:
            self.at(site)
        check_pattern(self.rank_pattern, sites)
        check_pattern(self.alpha_pattern, sites)

    def at(self, site: Site) -> tuple[int, float]:
        """(r, s) at a site. Raises BadParameter when r exceeds the matrix."""
        r, s = self.named(site.name)
        if r > min(site.d_in, site.d_out):
            raise BadParameter(
                f"r={r} exceeds the matrix at site {site.name!r} ({site.d_out} × {site.d_in}); "
                f"use r <= {min(site.d_in, site.d_out)}, or a rank_pattern entry for this site"
            )
        return r, s

    def named(self, name: str) -> tuple[int, float]:
        """(r, s) at a site of this name, whatever its matrix."""
        r = lookup(self.rank_pattern, name, self.r)
        return r, RULES[self.rule](r, lookup(self.alpha_pattern, name, self.alpha))


def frozen(pattern: Mapping[str, T] | None) -> tuple[tuple[str, T], ...]:
    """What the user typed as sorted pairs. Raises BadParameter for a key that is no regular expression."""
    for key in pattern or {}:
        try:
            re.compile(key)
        except re.error as error:
            raise BadParameter(f"pattern {key!r} is not a regular expression: {error}") from None
    return tuple(sorted((pattern or {}).items()))


def lookup(pattern: Sequence[tuple[str, T]], name: str, default: T) -> T:
    """The value of the first key that matches a site's name."""
    return next((value for key, value in pattern if _matches(key, name)), default)


def check_pattern(pattern: Sequence[tuple[str, T]], sites: Sequence[Site]) -> None:
    """Raise BadParameter for a key that matches none of the sites."""
    for key, _ in pattern:
        if not any(_matches(key, site.name) for site in sites):
            hint = did_you_mean(key, {site.name.rsplit(".", 1)[-1] for site in sites})
            raise BadParameter(f"pattern {key!r} matches the name of none of the {len(sites)} adapted sites. {hint}".rstrip())


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None
