"""A PEFT folder read as an adapter: as the very one that lorakit wrote, or else by the recipe that is closest to its configuration.

The tensors say which modules are adapted; the configuration must agree. PiSSA's A₀, B₀ are not in the file: they come from the base.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.folder import locate
from lorakit.adapters.io import check, read_weights
from lorakit.adapters.pair import Pair, rows_of, seen
from lorakit.adapters.peft_config import CONFIG, DETERMINED, read_config
from lorakit.adapters.peft_files import WEIGHTS, Found, Side, digests, read_side, sorted_out
from lorakit.adapters.peft_recipe import closest
from lorakit.adapters.record import read_bounded, recipe_in
from lorakit.adapters.weights import unpack
from lorakit.core import random
from lorakit.core.adapter import UNFROZEN, Adapter
from lorakit.core.errors import AdapterMismatch, CheckpointError
from lorakit.core.method import Method, Recipe, get_method
from lorakit.core.site import Site


def from_peft(folder: str | Path, *, model: nn.Module | None = None) -> Adapter:
    """The adapter in a PEFT folder. The model is needed for one that lorakit did not write, and for PiSSA.

    Raises NotExportable for types and settings that lorakit has no form for, CheckpointError for files that cannot be read, and
    AdapterMismatch for tensors that do not fit their configuration or the model.
    """
    folder = Path(folder)
    found, side = _read(folder)
    if side is not None and side.restorable:
        return check(_restored(found, side, model))
    if model is None:
        raise CheckpointError(f"{folder} is PEFT's and does not say what its modules are: give the model it is for (--model)")
    nearest = closest(found, model)
    kept = {k: v for k, v in found.config.items() if k not in DETERMINED or k == "peft_type"}
    meta = {**(side.record.meta if side is not None else {}), "peft": kept}
    pairs = [(site, nearest.pairs[site.name]) for site in nearest.sites]
    return check(_assembled(nearest.recipe, pairs, found, meta, model))


def _read(folder: Path) -> tuple[Found, Side | None]:
    path, weights = locate(folder, CONFIG), locate(folder, WEIGHTS)
    if path is None:
        raise CheckpointError(f"{folder} has no {CONFIG}")
    raw = read_bounded(path)
    config = read_config(raw, path)
    data = read_weights(weights, folder, WEIGHTS)
    found = sorted_out(config, unpack(data, weights or folder), path)
    return found, read_side(folder, digests({CONFIG: raw, WEIGHTS: data}))


def _assembled(recipe: Recipe, pairs: list[tuple[Site, Pair]], found: Found, meta: dict[str, Any], model: nn.Module | None) -> Adapter:
    method = get_method(recipe.name, **recipe.kwargs)
    tensors = {UNFROZEN + name: tensor for name, tensor in found.saved.items()}
    for site, pair in pairs:
        tensors |= {f"{site.name}.{k}": v for k, v in _tensors(site, method, pair, model).items()}
    return Adapter(recipe, tuple(site for site, _ in pairs), tensors, meta)


# --------------------------------------------------------------------------------------------------- the very adapter that was written
def _restored(found: Found, side: Side, model: nn.Module | None) -> Adapter:
    recipe, sites = recipe_in(side.record, side.path), tuple(s.site() for s in side.record.sites)
    if {s.module for s in sites} != set(found.pairs):
        raise AdapterMismatch(f"{side.path} names other modules than the tensors beside it")
    pairs = list(_shares(sites, get_method(recipe.name, **recipe.kwargs), found.pairs))
    return _assembled(recipe, pairs, found, side.record.meta, model)


def _shares(sites: tuple[Site, ...], method: Method, pairs: dict[str, Pair]) -> Iterator[tuple[Site, Pair]]:
    """Each site's share of its module's pair: its ranks in order, its rows of B."""
    ranks = {site: _expected(site, method)["A"].shape[0] for site in sites}
    start = dict.fromkeys(pairs, 0)
    for site in sites:
        pair = pairs[site.module]
        together = sum(r for s, r in ranks.items() if s.module == site.module)
        width = ranks[site] * pair.r // together  # twice the rank where an anchor is written beside the pair
        yield site, _share(pair, site, slice(start[site.module], start[site.module] + width))
        start[site.module] += width


def _share(pair: Pair, site: Site, ranks: slice) -> Pair:
    if site.rows is None:
        return pair
    rows = rows_of(site)
    if int(rows.max()) >= pair.B.shape[0]:
        raise AdapterMismatch(f"site {site.name!r} names rows that its module's {pair.B.shape[0]} do not have")
    return replace(pair, A=pair.A[ranks], B=pair.B[rows][:, ranks], m=None if pair.m is None else pair.m[rows])


# ------------------------------------------------------------------------------------------------------------------ a site's tensors
def _expected(site: Site, method: Method) -> dict[str, Tensor]:
    """The names and shapes of a site's tensors."""
    assert method.delta is not None
    return method.delta.build(site, dtype=torch.float32, device=torch.device("meta")).state_dict()


def _tensors(site: Site, method: Method, pair: Pair, model: nn.Module | None) -> dict[str, Tensor]:
    expected = _expected(site, method)
    r = expected["A"].shape[0]
    out = {"A": pair.A[:r], "B": pair.B[:, :r]}
    if pair.E is not None:
        out["g"] = pair.E.flatten()
    if pair.m is not None:
        out["m"] = pair.m
    if "A0" in expected:
        out |= {"A0": pair.A[r:], "B0": -pair.B[:, r:]} if pair.r == 2 * r else _anchor(site, method, model)
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _anchor(site: Site, method: Method, model: nn.Module | None) -> dict[str, Tensor]:
    """What PEFT subtracts from the base when it loads: nothing from an embedding, elsewhere what the method's own init computes."""
    assert method.delta is not None
    delta = method.delta.build(site, dtype=torch.float32, device=torch.device("cpu"))
    if site.kind == "linear":
        if model is None:
            raise CheckpointError(f"PiSSA's residual is computed again from the base at {site.name!r}: give the model (--model)")
        assert method.init is not None
        method.init(delta, seen(model, site, delta), site, random.generator(0, site.name))
    return {name: tensor for name, tensor in delta.state_dict().items() if name in ("A0", "B0")}
