"""Several adapters side by side: every weight that one of them changes, and the sites by which each of them does.

One adapter may have a fused weight as a whole (c_attn) where another has parts of it (c_attn[q]): then the whole is compared, and the parts
are rows of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from lorakit.adapters.bases import check_same_base
from lorakit.adapters.diagnose.update import Update, together
from lorakit.adapters.diagnose.updates import Updates
from lorakit.adapters.pair import rows_of
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch
from lorakit.core.site import Site, Where, among


@dataclass(frozen=True)
class Place:
    """One weight that at least one of several adapters changes."""

    name: str
    d_out: int
    d_in: int
    layer: int | None
    role: str
    sites: tuple[tuple[Site, ...], ...]
    """Of each adapter; empty where it does not change the weight."""

    def updates(self, i: int, updates: Updates) -> list[Update]:
        """The i-th adapter's update, of a stack one for each expert; none where it does not change the weight."""
        parts = [updates.at(site) for site in self.sites[i]]
        if len(parts) == 1 and self.sites[i][0].name == self.name:
            return parts[0]
        spread = [[u.spread(rows_of(site), self.d_out) for u in part] for site, part in zip(self.sites[i], parts, strict=True)]
        return [together(one) for one in zip(*spread, strict=True)]


def lineup(adapters: Mapping[str, Adapter], where: Where | None = None, *, force: bool = False) -> list[Place]:
    """The weights that the adapters change, those that `where` selects, in the order in which they first come.

    Raises AdapterMismatch for adapters of different bases (unless `force`), for two that change no weight in common, and for weights of one
    name but several shapes; NoSuchSite for a `where` that matches nothing.
    """
    if not force:
        check_same_base({name: adapter.meta for name, adapter in adapters.items()})
    every = list({site.name: site for adapter in adapters.values() for site in adapter.sites}.values())
    chosen = {site.name for site in (every if where is None else among(every, where))}
    wholes = {site.name for site in every if site.rows is None}
    found: dict[str, list[list[Site]]] = {}
    for i, adapter in enumerate(adapters.values()):
        for site in adapter.sites:
            name = site.whole if site.whole in wholes else site.name
            found.setdefault(name, [[] for _ in adapters])[i].append(site)
    places = [_place(name, list(adapters), sites) for name, sites in found.items() if any(s.name in chosen for own in sites for s in own)]
    _refuse_disjoint(adapters, places)
    return places


def lone(places: Sequence[Place], i: int, j: int) -> list[str]:
    """The weights that the i-th adapter changes and the j-th does not."""
    return [place.name for place in places if place.sites[i] and not place.sites[j]]


def _place(name: str, names: Sequence[str], found: list[list[Site]]) -> Place:
    first = next(site for own in found for site in own if site.name == name)
    for adapter, own in zip(names, found, strict=True):
        for site in own:
            fits = site.rows == first.rows and site.d_out == first.d_out if site.name == name else _last_row(site) < first.d_out
            if not fits or (site.d_in, site.experts) != (first.d_in, first.experts):
                raise AdapterMismatch(f"{site.name} of {adapter} is {_shape(site)}; that of another adapter is {_shape(first)}")
    return Place(name, first.d_out, first.d_in, first.layer, first.role, tuple(tuple(own) for own in found))


def _last_row(site: Site) -> int:
    return int(rows_of(site).max())


def _shape(site: Site) -> str:
    shape = " × ".join(str(d) for d in (site.experts, site.d_out, site.d_in) if d is not None)
    return shape if site.rows is None else f"{shape} in rows {', '.join(f'{r.start} to {r.stop}' for r in site.rows[:3])}"


def _refuse_disjoint(adapters: Mapping[str, Adapter], places: Sequence[Place]) -> None:
    for (i, a), (j, b) in combinations(enumerate(adapters), 2):
        if not any(place.sites[i] and place.sites[j] for place in places):
            names = [next((p.name for p in places if p.sites[k]), "none of the chosen weights") for k in (i, j)]
            raise AdapterMismatch(f"{a} and {b} change no weight in common ({names[0]}, …; {names[1]}, …): there is nothing to compare")
