"""Ranks and scales between the two formats: both say (r, alpha, a rule, patterns), and both must mean the same (r, s) at every module.

PEFT asks the patterns in the order of the file, lorakit in sorted order; PEFT writes sorted, but a file may have been edited.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lorakit.core.scale import Rank

T = TypeVar("T")

Wanted = Mapping[str, tuple[int, float]]
"""(r, s) by module name."""

RULES = {False: "linear", True: "sqrt"}
"""By `use_rslora`."""


def rank_in(config: Mapping[str, Any]) -> Rank:
    """What a LORA configuration says, its patterns in the file's order."""
    ranks, alphas = (tuple((config[key] or {}).items()) for key in ("rank_pattern", "alpha_pattern"))
    return Rank(config["r"], config["lora_alpha"], RULES[config["use_rslora"]], ranks, alphas)


def expressed(wanted: Wanted, *preferred: Rank) -> Rank:
    """A rule that gives every module its (r, s), its patterns sorted: the first of those preferred that does, or else one made of names."""
    for rank in preferred:
        ordered = replace(rank, rank_pattern=tuple(sorted(rank.rank_pattern)), alpha_pattern=tuple(sorted(rank.alpha_pattern)))
        if rank.rule in RULES.values() and all(_same(ordered.named(name), value) for name, value in wanted.items()):
            return ordered
    return _by_name(wanted)


def _same(one: tuple[int, float], other: tuple[int, float]) -> bool:
    """Equal ranks, and scales equal but for the last bits that α/√r and (s·r)/r may differ in."""
    return one[0] == other[0] and math.isclose(one[1], other[1], rel_tol=1e-14)


def trimmed(rank: Rank, names: Iterable[str]) -> Rank:
    """Without the patterns that match none of these modules: PEFT warns of them, and lorakit refuses to train with them."""
    names = list(names)

    def busy(pattern: tuple[tuple[str, T], ...]) -> tuple[tuple[str, T], ...]:
        return tuple((key, value) for key, value in pattern if any(Rank(1, 1.0, rank_pattern=((key, 2),)).named(n)[0] == 2 for n in names))

    return replace(rank, rank_pattern=busy(rank.rank_pattern), alpha_pattern=busy(rank.alpha_pattern))


def _by_name(wanted: Wanted) -> Rank:
    r, ranks = by_name({name: r for name, (r, _) in wanted.items()})
    alpha, alphas = by_name({name: s * r for name, (r, s) in wanted.items()})
    return Rank.of(
        r, alpha,
        rank_pattern={exactly(name): value for name, value in ranks.items()},
        alpha_pattern={exactly(name): value for name, value in alphas.items()},
    )  # fmt: skip


def by_name(wanted: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most common value, and those of the names that have another."""
    most = Counter(wanted.values()).most_common(1)[0][0]
    return most, {name: value for name, value in wanted.items() if value != most}


def exactly(name: str) -> str:
    """A pattern for this name and no other."""
    return "^" + re.escape(name)


def config_of(rank: Rank) -> dict[str, Any]:
    """The fields that say a rule."""
    return {
        "r": rank.r,
        "lora_alpha": number(rank.alpha),
        "use_rslora": rank.rule == "sqrt",
        "rank_pattern": dict(rank.rank_pattern),
        "alpha_pattern": {key: number(alpha) for key, alpha in rank.alpha_pattern},
    }


def number(x: float) -> int | float:
    """16.0 as 16, as PEFT's users write it."""
    return int(x) if float(x).is_integer() else x
