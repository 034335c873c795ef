"""The posterior of an adapter as it is stored: for each site's A and B a curvature, and one prior variance σ²."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.context import Cell
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.scale import Rank
from lorakit.core.shared import Patch
from lorakit.core.site import Site
from lorakit.parts.posterior.kronecker import Kronecker

NAME = "posterior"


class Posterior(Patch):
    """Buffers `<i>_<parameter>_<wide|square>` for the i-th site, and `variance` [1], 0 until it is fitted; no change of the model."""

    variance: Tensor

    def __init__(self, sites: Sequence[Site], rank: Rank, k: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.names = [site.name for site in sites]
        for i, site in enumerate(sites):
            r, _ = rank.at(site)
            for name, d in (("A", site.d_in), ("B", site.d_out)):
                self.register_buffer(f"{i}_{name}_wide", torch.zeros(d, k, dtype=dtype, device=device))
                self.register_buffer(f"{i}_{name}_square", torch.zeros(r, r, dtype=dtype, device=device))
        self.register_buffer("variance", torch.zeros(1, dtype=dtype, device=device))

    def install(self) -> None:
        """Nothing to change."""

    def remove(self) -> None:
        """Nothing to undo."""

    def of(self, site: str, parameter: str) -> Kronecker:
        """The curvature of a site's A or B."""
        i = self.names.index(site)
        return Kronecker(self.get_buffer(f"{i}_{parameter}_wide"), self.get_buffer(f"{i}_{parameter}_square"))

    def set_(self, site: str, parameter: str, found: Kronecker) -> None:
        """Store a curvature."""
        for mine, value in zip(self.of(site, parameter), found, strict=True):
            mine.copy_(value)

    @property
    def fitted(self) -> float:
        """σ². Raises Incompatible before the posterior is fitted."""
        if not self.variance.item():
            raise Incompatible("the posterior is fitted at the end of training, and this adapter was saved before")
        return self.variance.item()


@dataclass(frozen=True)
class PosteriorSpec:
    """The ranks of the adapter, and the rank k that is kept of each long side's curvature."""

    rank: Rank
    k: int
    name: str = NAME
    kept: str | None = None
    requires: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.k < 1:
            raise BadParameter(f"n_kfac={self.k} is not possible; at least 1")

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Posterior:
        return Posterior(sites, self.rank, self.k, dtype=dtype, device=device)

    def count(self, model: nn.Module) -> int:
        return 0
