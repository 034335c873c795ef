"""What a method becomes on a model before anything is attached: its sites, what they share, and the branch of each."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.adapter import POOL, Adapter
from lorakit.core.base import Base, base_of
from lorakit.core.context import Cell
from lorakit.core.errors import AdapterMismatch, Incompatible, did_you_mean
from lorakit.core.events import Init
from lorakit.core.layer import Branch
from lorakit.core.method import Method
from lorakit.core.shared import Shared, take_shapes
from lorakit.core.site import Site, select, sites_of
from lorakit.core.unfreeze import Unfrozen


def sites_for(model: nn.Module, method: Method, what: Method | Adapter) -> list[Site]:
    """Where a method, or a finished adapter of it, goes. Raises NoSuchSite, BadParameter, Incompatible or AdapterMismatch."""
    if method.delta is None:
        return []
    if isinstance(what, Method):
        sites = select(model, method.sites)
        method.check(sites)  # an error before anything is changed
        return sites
    here = {s.name: s for s in sites_of(model)}
    for site in what.sites:
        found = here.get(site.name)
        if found is None:
            raise AdapterMismatch(f"the adapter has a site {site.name!r} that this model lacks. {did_you_mean(site.name, here)}")
        if (found.d_out, found.d_in, found.rows, found.experts) != (site.d_out, site.d_in, site.rows, site.experts):
            raise AdapterMismatch(
                f"the adapter was made for a base of other shapes: {site.name} is {site.d_out} × {site.d_in} there, "
                f"{found.d_out} × {found.d_in} here"
            )
    method.check_kinds(what.sites)
    return list(what.sites)


def not_both(sites: list[Site], unfrozen: list[Unfrozen]) -> None:
    """A combine that rescales W may remember it, and W must stay."""
    weights = {f"{site.module}.{site.attribute}" for site in sites}
    both = [entry.name for entry in unfrozen if entry.name in weights]
    if both:
        raise Incompatible(f"{both[0]} is rescaled (sites) and trained whole (unfreeze); leave it out of one of the two")


def shared_of(model: nn.Module, method: Method, sites: list[Site], cell: Cell, seed: int) -> dict[str, Shared]:
    """The pool and the patches, by child name."""
    host = base_of(model.get_submodule(sites[0].module), sites[0].attribute) if sites else next(model.parameters())
    dtype, device = torch.promote_types(host.dtype, torch.float32), host.device
    made: dict[str, Shared | None] = {}
    if method.delta is not None:
        rng = random.generator(seed, POOL)
        every = [s for s in sites_of(model) if s.kind in method.delta.kinds]
        made[POOL] = method.delta.pool(sites, every=every, rng=rng, dtype=dtype, device=device)
    for patch in method.patches:
        rng = random.generator(seed, patch.name)
        made[patch.name] = patch.build(model, sites, cell=cell, rng=rng, dtype=dtype, device=device)
    return {child: module.train(model.training) for child, module in made.items() if module is not None}


def branch_at(
    site: Site, host: Base, method: Method, init: Init | None, pool: Shared | None, seed: int, saved: Mapping[str, Tensor]
) -> Branch:
    """One site's fresh branch. `saved`: a finished adapter's tensors, whose shapes it takes."""
    assert method.delta is not None
    dtype = torch.promote_types(host.dtype, torch.float32)
    delta = method.delta.build(site, pool=pool, dtype=dtype, device=host.device)
    take_shapes(delta.fit, {k: v.shape for k, v in saved.items()}, site.name)
    shell = Branch(site, host, delta, _Unset())  # type: ignore[arg-type]  # gives the init the base as the site sees it
    if init is not None:
        init(delta, shell.base, site, random.generator(seed, site.name))
    shell.combine = method.combine.build(site, shell.base, delta)
    return shell.train(host.module.training)


class _Unset(nn.Module):
    pass


def key_of(name: str, site: Site) -> str:
    """The key of an adapter's branch in its slot: the name, and the part of a fused weight."""
    return name + site.name[len(site.whole) :]
