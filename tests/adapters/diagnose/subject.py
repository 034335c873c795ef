"""Adapters made by hand, of any shapes, and what is true of their dense updates."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorakit.core.adapter import Adapter
from lorakit.core.method import get_method
from lorakit.core.site import Site

Sizes = Mapping[str, tuple[int, int]]
"""(d_out, d_in) by site name."""
BASE = {"name": "base", "checkpoint": None, "rows": "aaaa"}


def site(name: str, d_out: int, d_in: int) -> Site:
    return Site(name, "linear", d_in, d_out, 0, name.rsplit(".", 1)[-1])


def random_adapter(sizes: Sizes, *, method: str = "lora", seed: int = 0, base: dict[str, Any] | None = BASE, **kwargs: Any) -> Adapter:
    """Every A and B drawn at the rank that the recipe gives the site."""
    rng, made = torch.Generator().manual_seed(seed), get_method(method, **{"r": 2, **kwargs})
    sites = tuple(site(name, *size) for name, size in sizes.items())
    tensors = {}
    for s in sites:
        r, _ = made.delta.rank.at(s)
        tensors |= {f"{s.name}.A": torch.randn(r, s.d_in, generator=rng), f"{s.name}.B": torch.randn(s.d_out, r, generator=rng)}
    return Adapter(made.recipe, sites, tensors, {} if base is None else {"base": base})


def without_rank(adapter: Adapter, name: str) -> Adapter:
    """One site's pair of rank 0, which methods of varying rank (EVA) may leave."""
    A, B = adapter.tensors[f"{name}.A"], adapter.tensors[f"{name}.B"]
    return Adapter(adapter.recipe, adapter.sites, {**adapter.tensors, f"{name}.A": A[:0], f"{name}.B": B[:, :0]}, adapter.meta)


def resplit(adapter: Adapter, *, seed: int = 9) -> Adapter:
    """The same updates, split otherwise: A → G A, B → B G⁻¹."""
    rng, tensors = torch.Generator().manual_seed(seed), dict(adapter.tensors)
    for s in adapter.sites:
        A, B = adapter.tensors[f"{s.name}.A"].double(), adapter.tensors[f"{s.name}.B"].double()
        Q = torch.linalg.qr(torch.randn(len(A), len(A), generator=rng, dtype=torch.float64)).Q
        G = torch.linspace(0.5, 3.0, len(A), dtype=torch.float64)[:, None] * Q
        tensors |= {f"{s.name}.A": (G @ A).float(), f"{s.name}.B": (B @ G.inverse()).float()}
    return Adapter(adapter.recipe, adapter.sites, tensors, adapter.meta)


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW by site, in fp64, from the tensors and the recipe's scale alone."""
    found, delta = {}, adapter.method().delta
    for s in adapter.sites:
        t = adapter.of(s)
        found[s.name] = delta.rank.at(s)[1] * t["B"].double() @ t["A"].double()
    return found


def spaces(W: Tensor) -> tuple[Tensor, Tensor]:
    """Bases of the column and of the row space, by a dense decomposition."""
    U, S, Vh = torch.linalg.svd(W)
    k = int(S.gt(1e-6 * S.max()).sum())
    return U[:, :k], Vh[:k].T


def reference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """The figures of `distance`, from dense matrices; a missing one is zero."""
    names = a.keys() & b.keys()
    flat = {id(x): torch.cat([x[n].flatten() for n in sorted(names)]) for x in (a, b)}
    one, other = flat[id(a)], flat[id(b)]
    sizes = [sum(W.square().sum().item() for W in x.values()) ** 0.5 for x in (a, b)]
    bases = [[spaces(x[n]) for x in (a, b)] for n in names]
    shared = [[(p[0][k].T @ p[1][k]).square().sum().item() for p in bases] for k in (0, 1)]
    few = [min(p[0][0].shape[1], p[1][0].shape[1]) for p in bases]
    chance = [[p[0][k].shape[1] * p[1][k].shape[1] / len(p[0][k]) for p in bases] for k in (0, 1)]
    both, smaller = (one != 0) & (other != 0), torch.minimum(one.abs(), other.abs())
    against = both & (one.sign() != other.sign())
    return {
        "cosine": (one @ other).item() / (sizes[0] * sizes[1]),
        "row_overlap": sum(shared[1]) / sum(few),
        "row_chance": sum(chance[1]) / sum(few),
        "column_overlap": sum(shared[0]) / sum(few),
        "column_chance": sum(chance[0]) / sum(few),
        "sign_conflict": against.sum().item() / both.sum().item(),
        "weighted_conflict": smaller[against].sum().item() / smaller.sum().item(),
    }
