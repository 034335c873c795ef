"""Any change of weights as plain LoRA: exactly where it has factors, or cut to a rank, and then how far off that is.

    ΔW = U Σ Vᵀ        ΔW_q = U_q Σ_q V_qᵀ        ‖ΔW − ΔW_q‖² = Σ_{i>q} σ_i²: no other matrix of rank q is closer (Eckart-Young)

Where there are factors the decomposition is that of r-wide matrices (update.py) and ΔW is not formed; where there are none (a spectrum, a
rescaled W) one site after the other is. Each expert of a stack is cut by itself, all of a stack to the same rank. Everything in fp64.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.digest import digest
from lorakit.adapters.pair import change
from lorakit.adapters.peft_type import argument
from lorakit.adapters.plain import plain_lora
from lorakit.adapters.update import decomposed
from lorakit.core.adapter import UNFROZEN, Adapter
from lorakit.core.combine import AddSpec
from lorakit.core.delta import Delta, Factors
from lorakit.core.errors import BadParameter, NotExportable
from lorakit.core.method import describe, get_method
from lorakit.core.site import Site

META = "cut"
"""Where the result's meta says how it was made, how far off it is, and of which tensors that is true."""
ANOTHER = frozenset({"metrics", "compressed", "peft"})
"""What a meta says of an adapter's own tensors and form."""
ADVICE = "--rank R (or --energy 0.99) writes the closest plain LoRA, and its error"

Change = Factors | Tensor
"""Of one weight: its factors, or d_out × d_in; of a stack with E in front."""


@dataclass(frozen=True)
class Cut:
    """How much is kept of every site: at most `rank` directions, or as few as hold a share `energy` of Σ σ², or both."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise BadParameter("nothing says how much is to be kept; give a rank, or an energy of 0.99")
        if self.rank is not None and self.rank < 1:
            raise BadParameter(f"rank={self.rank}; expected at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise BadParameter(f"energy={self.energy}; expected 0 < energy <= 1, the share of Σ σ² that is kept (0.99)")

    def kept(self, squares: Tensor) -> int:
        """How many of σ² [k], largest first, are kept; at least one."""
        q = len(squares) if self.rank is None else min(self.rank, len(squares))
        if self.energy is None:
            return q
        left = squares.flip(0).cumsum(0).flip(0)  # Σ_{i ≥ j} σ_i²: small terms first, or they would be lost in the sum
        enough = torch.cat([left[1:], left.new_zeros(1)]) <= (1 - self.energy) * left[0]
        return min(q, 1 + int(enough.int().argmax()))


@dataclass(frozen=True)
class Closest:
    """A plain LoRA and how far it is from what it was made of. `errors`: of each site ‖ΔW − ΔW_q‖ / ‖ΔW‖, Frobenius; none where it is
    exact. `total`: that of all sites together."""

    adapter: Adapter
    errors: Mapping[str, float] = field(default_factory=dict)
    total: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        if not self.errors:
            return ["plain LoRA, exact"]
        worst = sorted(self.errors.items(), key=lambda item: -item[1])
        return [f"{name}: relative error {error:.2e}" for name, error in worst] + [f"in total: relative error {self.total:.2e}"]


def to_plain(adapter: Adapter, cut: Cut | None = None, *, model: nn.Module | None = None) -> Closest:
    """The adapter as `lora`: its exact factors, or with a `cut` the closest of that rank. What it trained whole stays as it is.

    Raises NotExportable for what is no change of weights, and without a cut for what has no factors. The model is needed where the change
    depends on W (DoRA).
    """
    method = adapter.method()
    if method.beyond is not None:
        raise NotExportable(f"{adapter.recipe.name} is more than a change of weights: {method.beyond}")
    if not isinstance(method.combine, AddSpec) and not method.combine.full_rank():
        raise NotExportable(f"{adapter.recipe.name} changes more than weights at its sites: plain LoRA cannot hold it")
    if not adapter.sites:
        raise NotExportable(f"{adapter.recipe.name} adapts no site: there is no change of a matrix in it")
    if cut is None:
        factors, errors, total = _exact(adapter), dict[str, float](), 0.0
    else:
        opened = adapter.opened()
        factors, errors, total = cut_all(((site, _change(adapter, site, opened(site), model)) for site in adapter.sites), cut)
    dropout = argument(adapter, "dropout") if "dropout" in describe(adapter.recipe.name).parameters else 0.0
    meta = {k: v for k, v in adapter.meta.items() if k not in ANOTHER}
    whole = {k: v for k, v in adapter.tensors.items() if k.startswith(UNFROZEN)}
    plain = with_whole(plain_lora(adapter.sites, factors, meta, dropout=float(dropout)), whole)
    return Closest(recorded(plain, cut, adapter.recipe.name, errors, total), errors, total)


def cut_all(changes: Iterable[tuple[Site, Change]], cut: Cut) -> tuple[dict[str, Factors], dict[str, float], float]:
    """(factors of every site, relative errors, that of all together); one change is looked at at a time."""
    factors, tails, squares = {}, {}, {}
    for site, one in changes:
        factors[site.name], tails[site.name], squares[site.name] = cut_one(one, cut)
    errors = {name: _ratio(tails[name], squares[name]) for name in tails}
    return factors, errors, _ratio(math.fsum(tails.values()), math.fsum(squares.values()))


def cut_one(one: Change, cut: Cut) -> tuple[Factors, float, float]:
    """(the closest pair in fp32, both sides sharing √σ; the squared norm of what it leaves out; that of the whole)."""
    parts = [_svd(part) for part in _pieces(one)]
    squares = torch.stack([S.square() for _, S, _ in parts])
    q = cut.kept(squares.sum(0))
    A = torch.stack([(V[:, :q] * S[:q].sqrt()).T for _, S, V in parts]).float()
    B = torch.stack([U[:, :q] * S[:q].sqrt() for U, S, _ in parts]).float()
    single = (one if isinstance(one, Tensor) else one.A).ndim == 2
    pair = Factors(A[0], B[0], 1.0) if single else Factors(A, B, 1.0)
    return pair, squares[:, q:].sum().item(), squares.sum().item()


def recorded(plain: Adapter, cut: Cut | None, of: str, errors: Mapping[str, float], total: float) -> Adapter:
    """With how it was made in its meta, where something may have been cut off."""
    if cut is None:
        return plain
    facts: dict[str, Any] = {"of": of, "rank": cut.rank, "energy": cut.energy, "error": total, "errors": dict(errors)}
    return dataclasses.replace(plain, meta={**plain.meta, META: {**facts, "sha256": digest(plain.tensors)}})


def with_whole(plain: Adapter, whole: Mapping[str, Tensor]) -> Adapter:
    """With parameters trained whole (keys `unfrozen.<parameter>`), in the recipe too."""
    if not whole:
        return plain
    names = tuple(sorted(key.removeprefix(UNFROZEN) for key in whole))
    recipe = get_method(plain.recipe.name, **{**plain.recipe.kwargs, "unfreeze": names}).recipe
    assert recipe is not None
    return dataclasses.replace(plain, recipe=recipe, tensors={**plain.tensors, **whole})


# ---------------------------------------------------------------------------------------------------------------------- the steps
def _exact(adapter: Adapter) -> dict[str, Factors]:
    try:
        return {name: bounded(f) for name, f in adapter.factors(stacks=True).items()}
    except NotExportable as error:
        raise NotExportable(f"{error}; {ADVICE}") from None


def bounded(f: Factors) -> Factors:
    """The same update, no wider than the matrix itself."""
    limit = min(f.A.shape[-1], f.B.shape[-2])
    return f if f.A.shape[-2] <= limit else cut_one(f, Cut(rank=limit))[0]


def _change(adapter: Adapter, site: Site, delta: Delta, model: nn.Module | None) -> Change:
    if not delta.linear or delta.bound() == 0:
        raise NotExportable(f"{adapter.recipe.name} changes no weight at {site.name}: plain LoRA cannot hold it")
    if not isinstance(adapter.method().combine, AddSpec):
        return change(adapter, site, delta, model)
    f = delta.factors()
    return delta.weight() if f is None else f


def _pieces(one: Change) -> list[Change]:
    """Of a stack each expert's."""
    if isinstance(one, Tensor):
        return [one] if one.ndim == 2 else list(one)
    return [one] if one.A.ndim == 2 else [Factors(A, B, one.s) for A, B in zip(one.A, one.B, strict=True)]


def _svd(one: Change) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, k], σ [k], V [d_in, k]."""
    if not isinstance(one, Tensor):
        return decomposed(one)
    U, S, Vh = torch.linalg.svd(one.detach().double(), full_matrices=False)
    return U, S, Vh.T


def _ratio(tail: float, whole: float) -> float:
    return math.sqrt(tail / whole) if whole > 0 else 0.0
