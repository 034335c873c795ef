"""EVA: explained variance adaptation.

    X = U Σ Vᵀ, the inputs of a site as rows        A₀ = V[:, 1..r_l]ᵀ        B₀ = 0        s = alpha / r
    r_l: of every site's first ⌊ρ r⌋ directions, those with the Σ r largest shares σ_i² / Σ σ² over all sites are kept

A starts at the directions in which the data vary most, and ranks go where most variance is explained: Σ_l r_l = Σ r. A site may end with
none, and is then left out; s is unchanged everywhere, as if alpha were scaled by r_l / r. W is untouched and the output at the start is
the base's, bit for bit.
X are the tokens with a label of `batches` batches of the training data. Their second moment is summed exactly, where the paper updates a
truncated SVD batch by batch until its components turn less than τ = 0.99. Without `center` X is as it comes, since A multiplies x as it
comes and the paper speaks of an SVD; PEFT subtracts the mean, as `center` does. At an embedding X is one-hot and A picks the commonest ids.
Sites that share an input (q, k, v) share its directions.
Trained: A and B, r_l (d_in + d_out) a site. `rho` 1 keeps all ranks at r. `whiten` divides row i of A by √σ_i. `niter` 0 is the exact
decomposition; above, that many randomized subspace iterations with twice as many test vectors as directions.
Defaults: rho 2, whiten off, s unchanged (PEFT and the official code), niter 4 (PEFT), center off and 64 batches (our choice).
References: arXiv:2410.07170; beyond the survey.

Use it when the data are far from what the base saw and ranks should follow the inputs' variance; it is `lora` afterwards, at no cost a
step. Not when what you teach is rare in the inputs: what A's start does not see is never learned, since both gradients vanish there (tests
and log).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core import random
from lorakit.core.base import Base
from lorakit.core.calibrate import TARGET_INPUTS, Seen
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.events import Calibrated
from lorakit.core.lowrank import LowRank, LowRankSpec
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import set_
from lorakit.parts.inits.triplets import principal, signed


@dataclass(frozen=True)
class FromInputs(Calibrated):
    """A₀ from the inputs' top right singular vectors; each site keeps as many as its share of the budget."""

    rank: Rank
    rho: float = 2.0
    whiten: bool = False
    center: bool = False
    niter: int = 4
    batches: int = 64
    requires: frozenset[str] = frozenset({"factors"})
    needs: frozenset[str] = frozenset({TARGET_INPUTS})

    def __post_init__(self) -> None:
        if self.rho < 1 or self.niter < 0 or self.batches < 0:
            raise BadParameter(
                f"rho={self.rho} must be at least 1 (the paper: 2), niter={self.niter} and batches={self.batches} at least 0"
            )

    def fit(self, seen: Mapping[str, Seen], sites: Sequence[Site]) -> "Directions":
        found = {site.name: self._directions(site, seen[site.name]) for site in sites}
        ranks = allocate({name: shares for name, (_, shares) in found.items()}, sum(self.rank.at(site)[0] for site in sites))
        return Directions({name: rows[: ranks[name]] for name, (rows, _) in found.items()})

    def _directions(self, site: Site, seen: Seen) -> tuple[Tensor, Tensor]:
        """(rows of A, shares) of a site's candidates, largest share first."""
        k = min(int(self.rho * self.rank.at(site)[0]), site.d_in, site.d_out)
        if seen.moment is None or seen.tokens < k:
            raise Incompatible(
                f"{seen.tokens} tokens with a label cannot give site {site.name!r} {k} directions; give more calibration batches"
            )
        moment = seen.moment
        if self.center and seen.total is not None:
            moment = moment - torch.outer(seen.total, seen.total) / seen.tokens
        V, variances = directions(moment, k, self.niter, random.generator(0, "eva"))  # equal inputs give equal directions
        rows = V / variances.clamp_min(torch.finfo(V.dtype).tiny)[:, None] ** 0.25 if self.whiten else V
        return rows, variances / (moment.sum() if moment.dim() == 1 else moment.trace())


@dataclass(frozen=True)
class Directions:
    """The init that follows from the data: each site's rows of A, none where a site is left out."""

    rows: Mapping[str, Tensor]
    requires: frozenset[str] = frozenset({"factors"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, LowRank)
        delta.resize(len(self.rows[site.name]))
        set_(delta.A, self.rows[site.name])


def directions(moment: Tensor, k: int, niter: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(V [k, d_in], σ² [k]): the top right singular vectors of X with moment XᵀX; of counts [d_in], the moment's diagonal where inputs are
    one-hot, the commonest ids."""
    if moment.dim() == 1:
        top = moment.sort(descending=True, stable=True)
        return torch.nn.functional.one_hot(top.indices[:k], len(moment)).to(moment.dtype), top.values[:k]
    _, variances, Vh = signed(*principal(moment, k, niter, rng, spare=k))
    return Vh, variances


def allocate(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of its directions each site keeps when the `budget` largest shares of all sites are kept; ties go to the earlier site."""
    order = torch.cat(list(shares.values())).sort(descending=True, stable=True).indices
    kept = torch.zeros(len(order), dtype=torch.long)
    kept[order[:budget]] = 1
    parts = kept.split([len(s) for s in shares.values()])
    return {name: int(part.sum()) for name, part in zip(shares, parts, strict=True)}


@method("eva", paper="arXiv:2410.07170", survey="3.3.1", kind="init")
def eva(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    rho: float = 2.0,
    whiten: bool = False,
    center: bool = False,
    niter: int = 4,
    batches: int = 64,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA whose A starts at the inputs' main directions, with ranks where they explain most variance."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    init = FromInputs(rank, rho, whiten, center, niter, batches)
    return Method(LowRankSpec(rank, dropout, flexible=True), init, sites=sites, unfreeze=unfreeze)
