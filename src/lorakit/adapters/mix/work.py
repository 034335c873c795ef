"""What a mixer does at each site of several adapters: to factors, or to the whole change of the weight."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.mix.mixers import Parts, Rule
from lorakit.adapters.mix.parts import each_matrix
from lorakit.adapters.mix.spaces import Here, Space, whole
from lorakit.adapters.update import norm
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter
from lorakit.core.site import Site

Stats = Sequence[Mapping[str, Tensor]]
"""For each adapter, by site name: the Gram matrix of its task's inputs [d_in, d_in], or the Fisher information of W [d_out, d_in]."""


class Work:
    """What is done at each site, and what was cut off so far."""

    def __init__(self, rule: Rule, space: Space, q: int | None, seed: int, stats: Stats | None, weights: dict[str, list[float]]) -> None:
        self.rule, self.space, self.q, self.seed, self.stats, self.weights = rule, space, q, seed, stats, weights
        self.tails: dict[str, tuple[float, float]] = {}
        n = len(next(iter(weights.values())))
        if rule.needs and (stats is None or len(stats) != n):
            raise BadParameter(f"this mixer needs a {rule.needs} of every adapter's task: stats holds {len(stats or ())} of {n}")

    def at(self, site: Site, parts: Parts) -> Factors:
        """The update of one site, in fp32, of low rank."""
        made = [self._factors(here, q) for here, q in self._each(site, parts)]
        if site.experts is None:
            return made[0]
        return Factors(torch.stack([f.A for f in made]), torch.stack([f.B for f in made]), 1.0)

    def whole(self, site: Site, parts: Parts) -> Tensor:
        """The change of one site's weight, in fp32, nothing cut off: [d_out, d_in], of a stack [E, d_out, d_in]."""
        made = [whole(here, q) for here, q in self._each(site, parts)]
        return made[0] if site.experts is None else torch.stack(made)

    def check(self, site: Site, parts: Parts) -> None:
        """Raises what `at` and `whole` raise of a site's statistics."""
        for i, f in enumerate(parts):
            if f is not None:
                self._stat(i, site)

    def _each(self, site: Site, parts: Parts) -> Iterator[tuple[Here, int | None]]:
        """What is put together at a site, of a stack for each expert, and the rank to which it is cut."""
        stats = [self._stat(i, site) if f is not None else None for i, f in enumerate(parts)]
        for name, some in each_matrix(site, parts):
            yield self._here(name, some, self.weights[site.name], stats)

    def _stat(self, i: int, site: Site) -> Tensor | None:
        if not self.rule.needs or self.stats is None:
            return None
        side = (site.d_in, site.d_in) if self.rule.needs == "gram" else (site.d_out, site.d_in)
        found = self.stats[i].get(site.name)
        if found is not None and not (found.isfinite().all() and (self.rule.needs == "gram" or (found >= 0).all())):
            raise BadParameter(
                f"the {self.rule.needs} of adapter {i + 1}'s task at {site.name} has entries that no {self.rule.needs} has: it is damaged; "
                "collect it again (`lorakit statistics`)"
            )
        if found is None or found.shape[-2:] != side or site.experts is not None:
            what = "has none" if found is None else f"has one of shape {tuple(found.shape)}"
            raise BadParameter(
                f"the mixer needs a {self.rule.needs} of shape {side} of adapter {i + 1}'s task at {site.name}; stats {what}"
            )
        return found

    def _here(self, name: str, parts: Parts, weights: Sequence[float], stats: Sequence[Tensor | None]) -> tuple[Here, int | None]:
        parts, weights, stats = self.rule.prepare(parts, weights, stats)
        there = [i for i, f in enumerate(parts) if f is not None]
        found = [f for f in parts if f is not None]
        here = Here(name, found, [weights[i] for i in there], [stats[i] for i in there], there, self.rule, self.seed)
        if self.q is None and self.rule.rank is not None:
            return here, self.rule.rank or max(len(f.A) for f in found)
        return here, self.q

    def _factors(self, here: Here, q: int | None) -> Factors:
        f, tail = self.space(here, q)
        if not len(f.A):  # nothing is left, and no LoRA has rank 0
            f = Factors(f.A.new_zeros(1, f.A.shape[1]), f.B.new_zeros(len(f.B), 1), 1.0)
        whole = q is None and self.rule.linear  # nothing was cut off, and the norm of a wide update costs more than the update
        self.tails[here.name] = (tail, 0.0 if whole else norm(f))
        return Factors(f.A.float().contiguous(), f.B.float().contiguous(), 1.0)

    def lost(self) -> dict[str, Any]:
        """Relative to the norm of what should have come out: in all, and at the site where it is most."""
        shares = {name: _share(tail, kept) for name, (tail, kept) in self.tails.items()}
        worst = max(shares, key=shares.__getitem__)
        sums = [math.hypot(*column) for column in zip(*self.tails.values(), strict=True)]
        return {"total": _share(sums[0], sums[1]), "worst": shares[worst], "where": worst}


def _share(tail: float, kept: float) -> float:
    whole = math.hypot(tail, kept)
    return tail / whole if whole else 0.0
