"""What a method becomes on a model before anything is attached: its sites, what they share, and the branch of each."""

from collections.abc import Mapping, Sequence

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
from lorakit.core.site import ROOT, Site, among
from lorakit.core.unfreeze import Unfrozen


def sites_for(known: Sequence[Site], method: Method, what: Method | Adapter) -> list[Site]:
    """Where a method, or a finished adapter of it, goes. Raises NoSuchSite, BadParameter, Incompatible or AdapterMismatch."""
    if method.delta is None:
        return []
    if isinstance(what, Method):
        sites = among(known, method.sites)
        method.check(sites)  # an error before anything is changed
        return sites
    here = {s.name: s for s in known}
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
    names = {site.name for site in what.sites}
    return [site for site in known if site.name in names]


def not_both(sites: list[Site], unfrozen: list[Unfrozen]) -> None:
    """A combine that rescales W may remember it, and W must stay."""
    weights = {f"{site.module}.{site.attribute}" for site in sites}
    both = [entry.name for entry in unfrozen if entry.name in weights]
    if both:
        raise Incompatible(f"{both[0]} is rescaled (sites) and trained whole (unfreeze); leave it out of one of the two")


def shared_of(
    model: nn.Module, method: Method, sites: list[Site], known: Sequence[Site], cell: Cell, seed: int, shapes: Mapping[str, torch.Size]
) -> dict[str, Shared]:
    """The pool and the patches, by child name. `known`: all sites of the model; `shapes`: those of a finished adapter's pool."""
    host = base_of(model.get_submodule(sites[0].module), sites[0].attribute) if sites else next(model.parameters())
    dtype, device = torch.promote_types(host.dtype, torch.float32), host.device
    made: dict[str, Shared | None] = {}
    if method.delta is not None:
        rng = random.generator(seed, POOL)
        every = [s for s in known if s.kind in method.delta.kinds]
        if shapes:
            twin = method.delta.pool(sites, every=every, rng=rng, dtype=dtype, device=torch.device("meta"))
            if twin is not None:  # a recipe and a file that do not go together are refused before anything of their size is made
                take_shapes(twin.fit, shapes, f"{ROOT}.{POOL}")
        made[POOL] = method.delta.pool(sites, every=every, rng=rng, dtype=dtype, device=device)
    for patch in method.patches:
        rng = random.generator(seed, patch.name)
        made[patch.name] = patch.build(model, sites, cell=cell, rng=rng, dtype=dtype, device=device)
    return {child: module.train(model.training) for child, module in made.items() if module is not None}


def branch_at(
    site: Site, host: Base, method: Method, init: Init | None, pool: Shared | None, seed: int, shapes: Mapping[str, torch.Size]
) -> Branch:
    """One site's fresh branch. `shapes`: those of a finished adapter's tensors, which it takes."""
    assert method.delta is not None
    dtype = torch.promote_types(host.dtype, torch.float32)
    delta = method.delta.build(site, pool=pool, dtype=dtype, device=host.device)
    if shapes and any(shapes.get(k, v.shape) != v.shape for k, v in delta.state_dict().items()):
        twin = method.delta.build(site, pool=pool, dtype=dtype, device=torch.device("meta"))
        take_shapes(twin.fit, shapes, site.name)  # shapes that do not go together are refused before anything of their size is made
        take_shapes(delta.fit, shapes, site.name)
    seen = host if site.rows is None else Branch(site, host, delta, nn.Identity()).base  # type: ignore[arg-type]
    if init is not None:
        init(delta, seen, site, random.generator(seed, site.name))
    return Branch(site, host, delta, method.combine.build(site, seen, delta)).train(host.module.training)


def take_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give tensors, which are returned, the values of their names: the very memory, where dtype and device are the same. One whose value
    has another shape, or is not there, stays as it is."""
    for name, tensor in tensors.items():
        value = values.get(name)
        if value is not None and value.shape == tensor.shape:
            tensor.data = value.to(tensor.device, tensor.dtype)
    return tensors


def key_of(name: str, site: Site) -> str:
    """The key of an adapter's branch in its slot: the name, and the part of a fused weight."""
    return name + site.name[len(site.whole) :]
