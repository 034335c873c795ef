"""What the types of low-rank pairs have in common: which pair is whose, and a site's tensors from its pair."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.pair import Pair, rows_of, seen
from lorakit.adapters.peft_type import Found, Part, PeftType
from lorakit.core import random
from lorakit.core.errors import AdapterMismatch, CheckpointError
from lorakit.core.method import Method
from lorakit.core.site import Site


class PairType(PeftType[Pair], ABC):
    """LORA and ADALORA: for every module one pair; several sites of a fused weight share it."""

    def tensors(self, found: Found[Pair], method: Method, sites: Sequence[Site], model: nn.Module | None) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for site, pair in _shares(sites, method, found.modules):
            out |= {f"{site.name}.{name}": tensor for name, tensor in _tensors(site, method, pair, model).items()}
        return out


def check_pair(module: str, part: Part, needed: frozenset[str], path: Path) -> Mapping[str, Tensor]:
    """The module's tensors, when they are those needed and fit each other. Raises AdapterMismatch."""
    parts = part.tensors
    if set(parts) != needed:
        odd = sorted(needed ^ set(parts))
        raise AdapterMismatch(f"module {module!r} has the tensors {sorted(parts)}; {path} needs them with or without {odd}")
    A, B = parts["A"], parts["B"]
    pair = A.ndim == B.ndim in (2, 3) and A.shape[-2] == B.shape[-1] and A.shape[:-2] == B.shape[:-2]
    if not pair or ("E" in parts and parts["E"].shape != (len(A), 1)) or ("m" in parts and parts["m"].shape != (len(B),)):
        shapes = {name: tuple(t.shape) for name, t in parts.items()}
        raise AdapterMismatch(f"the tensors of module {module!r} do not fit each other: {shapes}")
    return parts


# -------------------------------------------------------------------------------------------------------------------- whose is what
def _shares(sites: Sequence[Site], method: Method, pairs: Mapping[str, Pair]) -> Iterator[tuple[Site, Pair]]:
    """Each site's share of its module's pair: its ranks in order, its rows of B."""
    ranks = {site: _blank(site, method, "meta")["A"].shape[-2] for site in sites}
    start = dict.fromkeys(pairs, 0)
    for site in sites:
        pair = pairs[site.whole]
        together = sum(r for s, r in ranks.items() if s.whole == site.whole)
        width = ranks[site] * pair.r // together  # twice the rank where an anchor is written beside the pair
        yield site, _share(pair, site, slice(start[site.whole], start[site.whole] + width))
        start[site.whole] += width


def _share(pair: Pair, site: Site, ranks: slice) -> Pair:
    if site.rows is None:
        return pair
    rows = rows_of(site)
    if int(rows.max()) >= pair.B.shape[-2]:
        raise AdapterMismatch(f"site {site.name!r} names rows that its module's {pair.B.shape[-2]} do not have")
    B = pair.B.index_select(-2, rows)[..., ranks]
    return replace(pair, A=pair.A[..., ranks, :], B=B, m=None if pair.m is None else pair.m[rows])


# ------------------------------------------------------------------------------------------------------------------ a site's tensors
def _tensors(site: Site, method: Method, pair: Pair, model: nn.Module | None) -> dict[str, Tensor]:
    expected = _blank(site, method, "meta")
    r = expected["A"].shape[-2]
    out = {"A": pair.A[..., :r, :], "B": pair.B[..., :r]}
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
    delta = method.delta.build(site, pool=None, dtype=torch.float32, device=torch.device("cpu"))
    if site.kind == "linear":
        if model is None:
            raise CheckpointError(f"PiSSA's residual is computed again from the base at {site.name!r}: give the model (--model)")
        init: Any = method.init
        init(delta, seen(model, site, delta), site, random.generator(0, site.name))
    return {name: tensor for name, tensor in delta.state_dict().items() if name in ("A0", "B0")}


def _blank(site: Site, method: Method, device: str) -> dict[str, Tensor]:
    """The names and shapes of a site's tensors."""
    assert method.delta is not None
    return method.delta.build(site, pool=None, dtype=torch.float32, device=torch.device(device)).state_dict()
