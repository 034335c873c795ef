"""The spectrum of an update: how many directions it uses, and which of them are strangers to W.

    rank90           the smallest k with σ_1² + … + σ_k² ≥ 0.9 Σ σ²     (LoRA learns less: arXiv:2405.09673)
    stable rank      Σ σ² / σ_1²
    effective rank   exp of the entropy of the shares σ² / Σ σ²
    intruders        of the 10 strongest left singular vectors of W + ΔW, those whose |cosine| with every one of W is below 0.5
                     (arXiv:2410.21228; PEFT counts them in the same way)

Where there are factors the spectrum is that of an r × r core. Intruders need all singular vectors of W and the strongest of W + ΔW: two
dense decompositions of every weight, one weight at a time, and no way around them (cut-off ones mix vectors of nearly equal σ, which then
look like strangers). The update of a full fine-tuning, the difference of two models, has no factors and is decomposed too.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lorakit.adapters.diagnose.update import Update, whole
from lorakit.adapters.diagnose.updates import Updates, beside
from lorakit.adapters.pair import rows_of
from lorakit.core.adapter import Adapter
from lorakit.core.base import base_of
from lorakit.core.errors import AdapterMismatch, BadParameter
from lorakit.core.site import Site, Where, among, select, sites_of

SHARE = 0.9
TOP, EPSILON = 10, 0.5


@dataclass(frozen=True)
class Spectrum:
    """One weight's."""

    name: str
    role: str
    layer: int | None
    d_out: int
    d_in: int
    singular_values: list[float] = field(repr=False)
    """Without zeros."""
    cosines: list[float] | None = field(repr=False)
    """Of each of the strongest singular vectors of W + ΔW: the largest |cosine| with those of W. None where W was not looked at."""
    epsilon: float

    @property
    def figures(self) -> dict[str, float | int | None]:
        """Everything by name; ranks are 0 for an update of zero."""
        values = torch.tensor(self.singular_values, dtype=torch.float64)
        return {
            "norm": values.norm().item(),
            "rank": len(values),
            "rank90": rank_of(values, SHARE),
            "stable_rank": (values / values[0]).square().sum().item() if len(values) else 0.0,
            "effective_rank": effective_rank(values),
            "intruders": None if self.cosines is None else sum(c < self.epsilon for c in self.cosines),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | self.figures


@dataclass(frozen=True)
class Spectra:
    """What `lorakit diagnose spectrum` prints."""

    name: str
    sites: list[Spectrum]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"name": self.name, "sites": [s.as_dict() for s in self.sites], "notes": self.notes}

    def table(self) -> Table:
        """For people."""
        table = Table(title=Text(f"spectra of {self.name}"), caption=Text("\n".join(self.notes)) if self.notes else None)
        table.add_column("weight", overflow="fold")
        for column in ("shape", "rank", "90 % of Σσ²", "stable rank", "effective rank", "norm", "intruders"):
            table.add_column(column, justify="right")
        for s in self.sites:
            f = s.figures
            ranks = (str(f["rank"]), str(f["rank90"]), f"{f['stable_rank']:.1f}", f"{f['effective_rank']:.1f}", f"{f['norm']:.3g}")
            intruders = "-" if s.cosines is None else f"{f['intruders']} of {len(s.cosines)}"
            table.add_row(Text(s.name), f"{s.d_out}×{s.d_in}", *ranks, intruders)
        return table


def spectra(
    adapter: Adapter,
    model: nn.Module | None = None,
    *,
    name: str = "the adapter",
    where: Where | None = None,
    intruders: bool = True,
    top: int = TOP,
    epsilon: float = EPSILON,
) -> Spectra:
    """Of every site; a stack of experts is one weight for each. Without `intruders` the model is needed only where W is rescaled."""
    updates, sites = Updates.of(adapter, model), list(adapter.sites)
    chosen = sites if where is None else among(sites, where)
    changes = ((site, updates.at(site), updates.weights(site) if intruders else None) for site in chosen)
    return Spectra(name, _spectra(changes, top, epsilon), beside(adapter))


def spectra_of_tuning(
    base: nn.Module,
    tuned: nn.Module,
    *,
    name: str = "the tuned model",
    where: Where = "all-linear",
    intruders: bool = True,
    top: int = TOP,
    epsilon: float = EPSILON,
) -> Spectra:
    """Of a full fine-tuning: the difference of two models at the weights that `where` selects. Raises AdapterMismatch for models of other
    shapes."""
    changes = _tuning(base, tuned, where, intruders)
    return Spectra(name, _spectra(changes, top, epsilon), [])


Change = tuple[Site, list[Update], list[Tensor] | None]


def _tuning(base: nn.Module, tuned: nn.Module, where: Where, weights: bool) -> Iterator[Change]:
    there = {site.name: site for site in sites_of(tuned)}
    for site in select(base, where):
        other = there.get(site.name)
        if other is None or (other.d_out, other.d_in, other.experts) != (site.d_out, site.d_in, site.experts):
            found = "has none" if other is None else f"has {other.d_out} × {other.d_in}"
            raise AdapterMismatch(f"{site.name} is {site.d_out} × {site.d_in} in the base, and the tuned model {found}; is it its base?")
        W, now = (_weight(model, site) for model in (base, tuned))
        yield site, whole(now.double() - W.double()), (list(W.unbind()) if W.ndim == 3 else [W]) if weights else None


def _weight(model: nn.Module, site: Site) -> Tensor:
    """In fp32; of a fused weight the site's own rows."""
    W = base_of(model.get_submodule(site.module), site.attribute).dense(torch.float32)
    return W if site.rows is None else W.index_select(-2, rows_of(site))


def _spectra(changes: Iterable[Change], top: int, epsilon: float) -> list[Spectrum]:
    if top < 1 or not 0 < epsilon <= 1:
        raise BadParameter(f"top={top}, epsilon={epsilon}: expected at least one singular vector, and a cosine over 0 and up to 1")
    found = []
    for site, updates, weights in changes:
        for e, update in enumerate(updates):
            name = site.name if len(updates) == 1 else f"{site.name}[{e}]"
            cosines = None if weights is None else likeness(weights[e], update, top).tolist()
            values = update.thin.S.tolist()
            found.append(Spectrum(name, site.role, site.layer, *update.shape, values, cosines, epsilon))
    return found


def rank_of(values: Tensor, share: float) -> int:
    """How many of the largest singular values make up this share of Σ σ²; 0 of none."""
    energy = values.square().cumsum(0)
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1 if len(values) else 0


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the squared singular values' shares: how many directions matter; 0 for an update of zero."""
    squares = values.double().square()
    if not squares.sum() > 0:
        return 0.0
    shares = squares[squares > 0] / squares.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def likeness(W: Tensor, update: Update, top: int = TOP) -> Tensor:
    """Of each of the `top` strongest left singular vectors of W + ΔW, the largest |cosine| with those of W: [min(top, d)]."""
    if not update.thin.rank:
        return W.new_ones(min(top, *W.shape))
    before = torch.linalg.svd(W, full_matrices=False).U
    after = torch.linalg.svd(W + update.rows(slice(None)).to(W), full_matrices=False).U[:, :top]
    cosines: Tensor = (before.T @ after).abs()
    return cosines.amax(0)
