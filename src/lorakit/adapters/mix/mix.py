"""`mix`: several finished adapters to one, site by site; `mix_into`: the same into their base."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.adapters.digest import digest
from lorakit.adapters.mix.mixers import Rule, get_mixer
from lorakit.adapters.mix.parts import Progress, Sources
from lorakit.adapters.mix.spaces import Space, space_of
from lorakit.adapters.mix.work import Stats, Work
from lorakit.adapters.plain import plain_lora
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter
from lorakit.core.fingerprint import check_base, fingerprint
from lorakit.core.fold import check_bare, fold
from lorakit.core.scale import check_pattern, frozen, lookup
from lorakit.core.site import Site

Weight = float | Mapping[str, float]
"""One for all sites, or {pattern: weight} as in a rank_pattern; `default` is that of the other sites, 1 unless given."""


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
    given = _Order(how, weights, space, seed, stats, options)
    sources = Sources(adapters, force=force)
    work = given.work(adapters)
    factors: dict[str, Factors] = {}
    for i, site in enumerate(sources.sites):
        factors[site.name] = work.at(site, sources.factors(site))
        if progress is not None:
            progress(i + 1, len(sources.sites))
    record = given.record(adapters) | {"lost": work.lost()}
    return plain_lora(sources.sites, factors, {**_agreed(adapters), "mix": record})


def mix_into(
    model: nn.Module,
    adapters: Sequence[Adapter],
    how: str = "linear",
    *,
    weights: Sequence[Weight] | None = None,
    seed: int = 0,
    stats: Stats | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write what the adapters do together into the weights of their base, for good: in delta space, and nothing is cut off.

    The arguments are those of `mix`. One weight's change lies in memory at a time, in fp32. What is wrong with arguments, adapters, bases
    and statistics is found before the first weight is written; where arithmetic fails at a site (a density that keeps nothing of it, Gram
    matrices whose sum is not positive), the sites before it are written already. Returns how it was made and of what, as a mixture's meta
    says it.
    """
    check_bare(model)
    given = _Order(how, weights, "delta", seed, stats, options)
    sources = Sources(adapters, force=force)
    here = fingerprint(model)
    for adapter in adapters:
        check_base(adapter, here, force=force)
    work = given.work(adapters)
    for site in sources.sites:
        work.check(site, sources.factors(site))

    def changes() -> Iterator[tuple[Site, Tensor]]:
        for i, site in enumerate(sources.sites):
            yield site, work.whole(site, sources.factors(site))
            if progress is not None:
                progress(i + 1, len(sources.sites))

    fold(model, sources.sites, changes())
    return given.record(adapters)


class _Order(NamedTuple):
    """What was asked for."""

    how: str
    weights: Sequence[Weight] | None
    space: str
    seed: int
    stats: Stats | None
    options: Mapping[str, Any]

    def work(self, adapters: Sequence[Adapter]) -> Work:
        """Raises BadParameter."""
        rule, space, q = understood(self.how, self.space, self.seed, self.options)
        return Work(rule, space, q, self.seed, self.stats, _by_site(self._weights(adapters), adapters))

    def record(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """The same in JSON, and of what it was made."""
        return {
            "how": self.how,
            "space": self.space,
            "weights": [dict(w) if isinstance(w, Mapping) else w for w in self._weights(adapters)],
            "options": {**get_mixer(self.how).options, **self.options},
            "seed": self.seed,
            "sources": [_source(adapter) for adapter in adapters],
        }

    def _weights(self, adapters: Sequence[Adapter]) -> Sequence[Weight]:
        if self.weights is not None:
            return self.weights
        return [1.0 if get_mixer(self.how).unit else 1 / len(adapters)] * len(adapters)


def understood(how: str, space: str, seed: int, options: Mapping[str, Any]) -> tuple[Rule, Space, int | None]:
    """What the words mean, before any adapter is read. Raises BadParameter."""
    if not 0 <= seed < 2**63:
        raise BadParameter(f"seed={seed}; expected a number from 0 to 2**63 - 1")
    return (get_mixer(how).rule(**options), *space_of(space))


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
    own = {"mix": adapter.meta["mix"]} if "mix" in adapter.meta else {}
    return {"recipe": adapter.recipe.name, "sha256": digest(adapter.tensors), **own}


def _agreed(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What all of them say alike of more than their own tensors: the base, the template, how the base was packed."""
    first = adapters[0].meta
    return {k: v for k, v in first.items() if k not in OWN and all(k in a.meta and a.meta[k] == v for a in adapters)}


OWN = frozenset({"mix", "compressed", "metrics"})
"""What is said of an adapter's own tensors, and not true of the mixture's."""
