"""FourierFT: a few entries of the update's discrete Fourier spectrum.

    F = 0 except F[E] = c        ΔW = scaling · Re ifft2(F)        F: d_out × d_in, c: n_frequency trained values
    y = W x + ΔW x + bias        ifft2 divides by d_out · d_in

One entry at (u, v) is a plane wave: ΔW[p, q] = scaling / (d_out d_in) · c · cos 2π (u p / d_out + v q / d_in), of rank 2. As only the real
part counts, the entries (u, v) and (−u, −v) are the same wave: their coefficients add up.
The places E are drawn without replacement from `entry_seed` and are the same at all sites of one shape, so the adapter's file holds c
alone. They are PEFT's for the same seed, bit for bit, and so is ΔW in fp32.
ΔW is formed in every forward, in O(d² log d), and again in backward instead of being kept: merge before generating at length.
Trained: c, n_frequency values a site whatever its shape (`n_frequency_pattern`: other numbers at sites whose name ends in a match of the
regex). `init` normal: c ~ N(0, 1), which changes the output from the start, by a lot where the matrices are small; zero: the base's
output, and full gradients, as ΔW is linear in c. Dropout is not defined for it.
Defaults: PEFT's (n_frequency 1000, scaling 150, entry_seed 777, init normal). The paper's scripts: scaling 110 for RoBERTa, 300 for LLaMA,
with learning rates of 0.05 to 0.09.
References: arXiv:2405.03003; survey 5.1.3.

Use it when you want the fewest values for whole weights and merge before serving: a site has `n_frequency` of them, whatever its shape.
Each step forms ΔW densely; on small models the usual start harms (take `init=zero`), and the rate must be some fifty times LoRA's (log).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.core.base import Base
from lorakit.core.context import Ctx
from lorakit.core.delta import Delta, DeltaSpec
from lorakit.core.errors import BadParameter
from lorakit.core.method import Method, method
from lorakit.core.scale import check_pattern, frozen, lookup
from lorakit.core.shared import Shared
from lorakit.core.site import Site, Where
from lorakit.ops import spectral
from lorakit.parts.inits.random import normal, set_

ENTRIES = 2**31
"""Entries of the largest matrix: 8 bytes each while places are drawn."""


@functools.lru_cache(maxsize=32)
def places(d_out: int, d_in: int, n: int, seed: int) -> Tensor:
    """E as n distinct flat positions in a d_out × d_in matrix, row by row. BadParameter for a matrix of more than ENTRIES entries."""
    if d_out * d_in > ENTRIES:
        raise BadParameter(
            f"a matrix of {d_out} × {d_in} is too large for fourierft, which draws places among its entries; leave it out of sites"
        )
    return torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(seed))[:n].clone()


class Spectral(Delta):
    """One site's coefficients c [n] and their places."""

    trains = frozenset({"c"})
    at: Tensor

    def __init__(self, site: Site, spec: "SpectralSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape, self.s, self.provides = (site.d_out, site.d_in), spec.scaling, spec.provides
        n = spec.at(site)
        self.c = nn.Parameter(torch.zeros(n, dtype=dtype, device=device))
        self.register_buffer("at", places(*self.shape, n, spec.seed).to(device, copy=True), persistent=False)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        y: Tensor = spectral.project(x, self.c, self.at, *self.shape, self.s)
        return y

    def weight(self) -> Tensor:
        W: Tensor = spectral.wave(self.c, self.at, *self.shape)
        return W * self.s

    def bound(self) -> int:
        return min(2 * len(self.c), *self.shape)


@dataclass(frozen=True)
class SpectralSpec(DeltaSpec):
    """How many coefficients, at which sites other numbers, their scale, and the seed of their places."""

    n: int
    scaling: float
    seed: int
    pattern: tuple[tuple[str, int], ...] = ()

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"spectrum"})

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Spectral:
        return Spectral(site, self, dtype=dtype, device=device)

    def at(self, site: Site) -> int:
        """Coefficients at a site. Raises BadParameter when there are more than entries."""
        n = lookup(self.pattern, site.name, self.n)
        if not 1 <= n <= site.d_out * site.d_in:
            raise BadParameter(
                f"n_frequency={n} is not possible at site {site.name!r} ({site.d_out} × {site.d_in}); "
                f"use 1 to {site.d_out * site.d_in}, or an n_frequency_pattern entry for this site"
            )
        return n

    def check(self, sites: Sequence[Site]) -> None:
        check_pattern(self.pattern, sites)
        for site in sites:
            self.at(site)

    def count(self, site: Site) -> int:
        return self.at(site)


@dataclass(frozen=True)
class Coefficients:
    """c ~ N(0, 1), or zero."""

    init: Literal["normal", "zero"]
    requires: frozenset[str] = frozenset({"spectrum"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Spectral)
        if self.init == "normal":
            set_(delta.c, normal(delta.c, 1.0, rng))


@method("fourierft", paper="arXiv:2405.03003", survey="5.1.3", kind="spectrum")
def fourierft(
    n_frequency: int = 1000,
    scaling: float = 150.0,
    sites: Where = "all-linear",
    init: Literal["normal", "zero"] = "normal",
    entry_seed: int = 777,
    n_frequency_pattern: dict[str, int] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """The update as a few trained entries of its Fourier spectrum, at places that all sites of one shape share."""
    spec = SpectralSpec(n_frequency, scaling, entry_seed, frozen(n_frequency_pattern))
    return Method(spec, Coefficients(init), sites=sites, unfreeze=unfreeze, identity=init == "zero")
