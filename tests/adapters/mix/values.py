"""Adapters made of numbers, for the tests of this folder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.adapters.plain import plain_lora
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.site import Site


def site(name: str = "layers.0.q_proj", d_out: int = 12, d_in: int = 10) -> Site:
    return Site(name, "linear", d_in, d_out, 0, "q")


def pair(seed: int, r: int = 3, *, s: float = 2.0, d_out: int = 12, d_in: int = 10) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, d_in, generator=rng), torch.randn(d_out, r, generator=rng), s)


def adapter(*factors: Factors, meta: dict | None = None) -> Adapter:  # type: ignore[type-arg]
    """One site a pair."""
    sites = [site(f"layers.{i}.q_proj", len(f.B), f.A.shape[1]) for i, f in enumerate(factors)]
    return plain_lora(sites, {s.name: f for s, f in zip(sites, factors, strict=True)}, meta or {})


def dense(f: Factors) -> Tensor:
    return f.s * f.B.double() @ f.A.double()


def weight(mixed: Adapter, i: int = 0) -> Tensor:
    """ΔW of one site, in fp64."""
    f = mixed.factors()[f"layers.{i}.q_proj"]
    return dense(f)


def close(one: Tensor, other: Tensor, tolerance: float = 2e-6) -> bool:
    """Relative to the second's norm, or to 1 where that is zero."""
    return float((one - other).norm()) <= tolerance * (float(other.norm()) or 1.0)


def turned(f: Factors, seed: int = 9) -> Factors:
    """The same update in other factors: A → GA, B → BG⁻¹."""
    r = len(f.A)
    G = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2 * torch.eye(r)
    return Factors((G @ f.A.double()).float(), (f.B.double() @ torch.linalg.inv(G)).float(), f.s)


def stats_for(how: str, factors: Sequence[Factors], seed: int = 5) -> list[dict[str, Tensor]] | None:
    """What a mixer needs of every adapter's task, at its one site."""
    rng = torch.Generator().manual_seed(seed)
    if how == "regmean":
        X = [torch.randn(40, f.A.shape[1], generator=rng) for f in factors]
        return [{"layers.0.q_proj": x.T @ x / 40} for x in X]
    if how == "fisher":
        return [{"layers.0.q_proj": torch.rand(len(f.B), f.A.shape[1], generator=rng) + 0.1} for f in factors]
    return None
