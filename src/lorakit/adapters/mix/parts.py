"""Several adapters side by side: the same sites, the same base, and each one's update at a site when it is asked for.

An adapter's tensors are looked at one site at a time, so that folders that are read as they are used (adapters/io.py) never lie in memory
whole.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from lorakit.adapters.bases import check_same_base
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.errors import AdapterMismatch, BadParameter, Incompatible, NotExportable
from lorakit.core.site import Site


class Sources:
    """Adapters that can be put together. Raises what `mix` does."""

    def __init__(self, adapters: Sequence[Adapter], *, force: bool = False) -> None:
        if not adapters:
            raise BadParameter("no adapter was given; expected at least one")
        self.adapters = adapters
        for i, adapter in enumerate(adapters):
            _check_form(adapter, i)
        if not force:
            check_same_base({f"adapter {i + 1}": adapter.meta for i, adapter in enumerate(adapters)})
            _check_common(adapters)
        self.sites = _union(adapters)
        if not self.sites:
            raise BadParameter("the adapters change no weight at any site: there is nothing to put together")
        self._deltas = [adapter.opened() for adapter in adapters]
        self._at: list[dict[str, Site]] = [{site.name: site for site in adapter.sites} for adapter in adapters]

    def factors(self, site: Site) -> list[Factors | None]:
        """Every adapter's update at a site; None where it has none. Of a stack of experts A and B are stacks."""
        return [self._one(i, at[site.name]) if site.name in at else None for i, at in enumerate(self._at)]

    def _one(self, i: int, site: Site) -> Factors:
        f = self._deltas[i](site).factors()
        if f is None:
            name = self.adapters[i].recipe.name
            raise NotExportable(f"adapter {i + 1} ({name}) has no factors at {site.name}: {CONVERT}")
        if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all()):
            raise AdapterMismatch(f"adapter {i + 1} holds NaN or infinite values at {site.name}: it is damaged, or its training diverged")
        return f


CONVERT = "`lorakit convert ADAPTER --svd-rank R --out FOLDER` writes the closest plain LoRA of rank R, which can be mixed, and its error"


def each_matrix(site: Site, parts: Sequence[Factors | None]) -> Iterator[tuple[str, list[Factors | None]]]:
    """(a name, every adapter's update) of the site itself, or of each of its experts."""
    if site.experts is None:
        yield site.name, list(parts)
        return
    for e in range(site.experts):
        yield f"{site.name}[{e}]", [None if f is None else f._replace(A=f.A[e], B=f.B[e]) for f in parts]


def _check_form(adapter: Adapter, i: int) -> None:
    try:
        adapter.check_factors(stacks=True)
    except NotExportable as error:
        raise NotExportable(f"adapter {i + 1}: {error}; {CONVERT}") from None
    whole = adapter.unfrozen()
    if whole:
        name = next(iter(whole))
        raise Incompatible(
            f"adapter {i + 1} also trained {len(whole)} parameters whole ({name}, …), which no mixer puts together; train without unfreeze"
        )


def _check_common(adapters: Sequence[Adapter]) -> None:
    for i, adapter in enumerate(adapters):
        names = {site.name for site in adapter.sites}
        others = {site.name for j, other in enumerate(adapters) if j != i for site in other.sites}
        if others and not names & others:
            raise AdapterMismatch(
                f"adapter {i + 1} has no site in common with the others ({min(names, default='none')}, … and {min(others)}, …): "
                "they change different weights; force=True (--force) takes what is missing for zero"
            )


def _union(adapters: Sequence[Adapter]) -> list[Site]:
    found: dict[str, tuple[int, Site]] = {}
    for i, adapter in enumerate(adapters):
        for site in adapter.sites:
            j, first = found.setdefault(site.name, (i, site))
            if _form(site) != _form(first):
                raise AdapterMismatch(f"{site.name} is {_words(first)} for adapter {j + 1} and {_words(site)} for adapter {i + 1}")
    return [site for _, site in found.values()]


def _form(site: Site) -> tuple[object, ...]:
    return site.kind, site.d_out, site.d_in, site.rows, site.experts


def _words(site: Site) -> str:
    return f"{site.kind} of {site.d_out} × {site.d_in}"


Progress = Callable[[int, int], None]
"""Told (sites done, sites in all)."""
