"""Where a block begins: the module whose input is the input of the attention, or of the feed-forward, that a site ends.

A module beside a block (arXiv:2110.04366) adds to the output projection's output what it makes of the block's input: for `o` the input of
`q` (or of the fused projection), for `down` that of `up` (or `gate`). A site of any other role reads its own input.
"""

from collections.abc import Sequence

from lorakit.core.errors import Incompatible
from lorakit.core.shared import Shared
from lorakit.core.site import Site

ENTRANCES = {"o": ("q", "qkv"), "down": ("up", "gate", "gate_up")}


class Entrances(Shared):
    """Paths by site; there are no tensors."""

    def __init__(self, paths: dict[str, str]) -> None:
        super().__init__()
        self.paths = paths

    @classmethod
    def find(cls, sites: Sequence[Site], every: Sequence[Site]) -> "Entrances":
        """Find the entrance of each site's block among all sites of the model. Raises Incompatible where it cannot be told."""
        found = {site.name: _entrance(site, every) for site in sites if site.role in ENTRANCES}
        lost = [name for name, entrance in found.items() if entrance is None]
        if lost and {site.name for site in every} != {site.name for site in sites}:  # at rest the sites are all there is to search
            raise Incompatible(
                f"no module in the layer of site {lost[0]!r} reads its block's input; a parallel module needs one with the role "
                f"{' or '.join(ENTRANCES[next(s.role for s in sites if s.name == lost[0])])}. Choose other sites, or the serial form"
            )
        return cls({name: entrance.module for name, entrance in found.items() if entrance is not None})

    def of(self, site: Site) -> tuple[str, ...]:
        """What the delta of a site `reads`."""
        return (self.paths[site.name],) if site.name in self.paths else ()


def _entrance(site: Site, every: Sequence[Site]) -> Site | None:
    """Of the whole linear sites of the layer with the right role and width, the one nearest by path."""
    roles = ENTRANCES[site.role]
    candidates = [s for s in every if s.layer == site.layer and s.rows is None and s.role in roles and s.d_in == site.d_out]
    return max(candidates, key=lambda s: (_shared(s.name, site.name), -roles.index(s.role)), default=None)


def _shared(one: str, two: str) -> int:
    """Leading components that two paths have in common."""
    same = [a == b for a, b in zip(one.split("."), two.split("."), strict=False)]
    return same.index(False) if False in same else len(same)
