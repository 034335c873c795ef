"""`mix`: several finished adapters to one, site by site."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.mix.mixers import Parts, Rule, get_mixer
from lorakit.adapters.mix.parts import Progress, Sources, each_matrix
from lorakit.adapters.mix.spaces import Here, Space, space_of
from lorakit.adapters.plain import plain_lora
from lorakit.adapters.update import norm
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter
from lorakit.core.scale import check_pattern, frozen, lookup
from lorakit.core.site import Site

Weight = float | Mapping[str, float]
"""One for all sites, or {pattern: weight} as in a rank_pattern; `default` is that of the other sites, 1 unless given."""
Stats = Sequence[Mapping[str, Tensor]]
"""For each adapter, by site name: the Gram matrix of its task's inputs [d_in, d_in], or the Fisher information of W [d_out, d_in]."""


def mix(
    adapters: Sequence[Adapter],
    how: str = "linear",
    *,
    weights: Sequence[Weight] | None = None,
    space: str = "delta",
    seed: int = 0,
    stats: Stats | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Adapter:
    """One plain LoRA, s = 1, that does what the adapters do together. Nothing of them is changed.

    Args:
        adapters: of any methods that have factors, of different ranks, scales and sites; a site that one of them lacks is zero there.
        how: a mixer (mixers.py), its options as further arguments.
        weights: of any sign, one an adapter; None: 1/N each, or 1 where the mixer says so.
        space: delta, core, knots or factor, each with +svd:Q (spaces.py).
        seed: of what the mixer draws, and of the range finder.
        stats: what regmean and fisher need (serve/statistics.py collects it).
        force: also for other bases, and for sites that no two of them share.

    The result's meta says under "mix" how it was made, of what, and how much of it, relative to the norm, was cut off.
    Raises BadParameter, AdapterMismatch, NotExportable for an adapter without factors, Incompatible.
    """
    mixer, (where, q) = get_mixer(how), space_of(space)
    rule = mixer.rule(**options)
    sources = Sources(adapters, force=force)
    if weights is None:
        weights = [1.0 if mixer.unit else 1 / len(adapters)] * len(adapters)
    work = _Work(rule, where, q, seed, stats, _by_site(weights, adapters))
    factors: dict[str, Factors] = {}
    for i, site in enumerate(sources.sites):
        factors[site.name] = work.at(site, sources.factors(site))
        if progress is not None:
            progress(i + 1, len(sources.sites))
    record = {
        "how": how,
        "space": space,
        "weights": [dict(w) if isinstance(w, Mapping) else w for w in weights],
        "options": {**mixer.options, **options},
        "seed": seed,
        "sources": [_source(adapter) for adapter in adapters],
        "lost": work.lost(),
    }
    return plain_lora(sources.sites, factors, {**_agreed(adapters), "mix": record})


class _Work:
    """What is done at each site, and what was cut off so far."""

    def __init__(self, rule: Rule, space: Space, q: int | None, seed: int, stats: Stats | None, weights: dict[str, list[float]]) -> None:
        self.rule, self.space, self.q, self.seed, self.stats, self.weights = rule, space, q, seed, stats, weights
        self.tails: dict[str, tuple[float, float]] = {}
        n = len(next(iter(weights.values())))
        if rule.needs and (stats is None or len(stats) != n):
            raise BadParameter(f"this mixer needs a {rule.needs} of every adapter's task: stats holds {len(stats or ())} of {n}")

    def at(self, site: Site, parts: Parts) -> Factors:
        """The update of one site, in fp32."""
        stats = [self._stat(i, site) if f is not None else None for i, f in enumerate(parts)]
        made = [self._matrix(name, some, self.weights[site.name], stats) for name, some in each_matrix(site, parts)]
        if site.experts is None:
            return made[0]
        return Factors(torch.stack([f.A for f in made]), torch.stack([f.B for f in made]), 1.0)

    def _stat(self, i: int, site: Site) -> Tensor | None:
        if not self.rule.needs or self.stats is None:
            return None
        side = (site.d_in, site.d_in) if self.rule.needs == "gram" else (site.d_out, site.d_in)
        found = self.stats[i].get(site.name)
        if found is None or found.shape[-2:] != side or site.experts is not None:
            what = "has none" if found is None else f"has one of shape {tuple(found.shape)}"
            raise BadParameter(
                f"the mixer needs a {self.rule.needs} of shape {side} of adapter {i + 1}'s task at {site.name}; stats {what}"
            )
        return found

    def _matrix(self, name: str, parts: Parts, weights: Sequence[float], stats: Sequence[Tensor | None]) -> Factors:
        parts, weights, stats = self.rule.prepare(parts, weights, stats)
        there = [i for i, f in enumerate(parts) if f is not None]
        found = [f for f in parts if f is not None]
        here = Here(name, found, [weights[i] for i in there], [stats[i] for i in there], there, self.rule, self.seed)
        q = self.q
        if q is None and self.rule.rank is not None:
            q = self.rule.rank or max(len(f.A) for f in found)
        f, tail = self.space(here, q)
        if not len(f.A):  # nothing is left, and no LoRA has rank 0
            f = Factors(f.A.new_zeros(1, f.A.shape[1]), f.B.new_zeros(len(f.B), 1), 1.0)
        self.tails[name] = (tail, norm(f))
        return Factors(f.A.float(), f.B.float(), 1.0)

    def lost(self) -> dict[str, Any]:
        """Relative to the norm of what should have come out: in all, and at the site where it is most."""
        shares = {name: _share(tail, kept) for name, (tail, kept) in self.tails.items()}
        worst = max(shares, key=shares.__getitem__)
        sums = [math.hypot(*column) for column in zip(*self.tails.values(), strict=True)]
        return {"total": _share(sums[0], sums[1]), "worst": shares[worst], "where": worst}


def _share(tail: float, kept: float) -> float:
    whole = math.hypot(tail, kept)
    return tail / whole if whole else 0.0


def _by_site(weights: Sequence[Weight], adapters: Sequence[Adapter]) -> dict[str, list[float]]:
    """By site name, one an adapter."""
    if len(weights) != len(adapters):
        raise BadParameter(f"{len(weights)} weights for {len(adapters)} adapters; expected one each")
    sites = {site.name: site for adapter in adapters for site in adapter.sites}
    columns = [_column(weight, sites) for weight in weights]
    return {name: [column[name] for column in columns] for name in sites}


def _column(weight: Weight, sites: Mapping[str, Site]) -> dict[str, float]:
    pattern, default = ({}, weight) if not isinstance(weight, Mapping) else (dict(weight), weight.get("default", 1.0))
    pattern.pop("default", None)
    for value in (default, *pattern.values()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadParameter(f"weight {value!r} is not a finite number")
    pairs = frozen({key: float(value) for key, value in pattern.items()})
    check_pattern(pairs, list(sites.values()))
    return {name: lookup(pairs, name, float(default)) for name in sites}


def _source(adapter: Adapter) -> dict[str, Any]:
    """What an ingredient was, and of what it was made in turn."""
    digest = hashlib.sha256()
    for name in sorted(adapter.tensors):
        digest.update(name.encode())
        digest.update(adapter.tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
    own = {"mix": adapter.meta["mix"]} if "mix" in adapter.meta else {}
    return {"recipe": adapter.recipe.name, "sha256": digest.hexdigest()[:32], **own}


def _agreed(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What all of them say alike of themselves: the base, the template, how the base was packed."""
    first = adapters[0].meta
    return {k: v for k, v in first.items() if k != "mix" and all(k in a.meta and a.meta[k] == v for a in adapters)}
