"""A finished adapter with most of its values zero and the others of one size: a thirtieth of its bytes (ComPEFT, survey 4.2).

    τ̃ = α σ(τ) sign(τ) ∘ m        m keeps the ⌊k D⌋ values of largest |τ|

τ [D]: what was trained at the sites and in what they share, as it is (an A's random start is not subtracted, as in the paper); σ(τ): its
standard deviation before anything is left out. Everything else stays exact: frozen factors, DoRA's m, whole parameters, prefixes, and
vectors beside matrices (a gate, a module's biases), which are few and count much.

`scope` is what one τ is, and so has one threshold and one σ:
    adapter    all values together: the paper
    factor     all A, all B, …: the default
    tensor     each tensor by itself
Where A and B differ in scale, one threshold for both keeps hardly anything of the smaller, and the update is their product: of a LoRA of
rank 16 after 60 steps nothing was left at 41 of 42 sites. Of the other two neither was better on both adapters that were tried. After a few
steps, when A is still as it was drawn, ±1/√d_in, one threshold for all A keeps none of a site whose d_in is large (`Report.lost`).
`keep` is what the kept values become:
    ternary      α σ(τ) sign(τ): the paper
    mean         α mean |τ kept| sign(τ): its ablation STC (the authors' code takes the mean of the signed values, which is about zero)
    magnitude    α τ: its ablation of pruning alone

The result is an ordinary adapter; `save_adapter(…, coded=True)` writes it in few bytes (sparse.py), and reading gives it back bit by bit.
References: arXiv:2311.13171; its code, github.com/prateeky2806/ComPEFT, keeps one value more, and all that equal the last.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorakit.adapters import sparse
from lorakit.adapters.digest import digest
from lorakit.adapters.folder import locate
from lorakit.adapters.io import WEIGHTS, found_weights
from lorakit.adapters.update import norm
from lorakit.adapters.weights import read
from lorakit.core.adapter import POOL, Adapter
from lorakit.core.delta import Delta, Factors
from lorakit.core.errors import AdapterMismatch, BadParameter, NotExportable
from lorakit.core.shared import Shared
from lorakit.core.site import ROOT

META = "compressed"
"""Where the result's meta says how it was made, and of which tensors that is true."""
MEASURED = "metrics"
"""What its meta says of the adapter before, and not of this one."""

SCOPES: Mapping[str, Callable[[str], str]] = {
    "adapter": lambda name: "",
    "factor": lambda name: name.rpartition(".")[2],
    "tensor": lambda name: name,
}
"""What the names of the tensors of one τ have in common."""

SIZES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ternary": lambda tau, kept: _deviation(tau),
    "mean": lambda tau, kept: tau[kept].double().abs().mean(),
    "magnitude": lambda tau, kept: tau.abs(),
}
"""From τ and the mask of what is kept to the size of that, before α: one number, or [D]."""

NOTHING = 1e-12
"""Below this share of what it was, an update is rounding."""
STARTS = frozenset({"anchor", "snapshot"})
"""What a delta provides whose update is the difference of two nearly equal products."""


def compress(adapter: Adapter, *, density: float = 0.2, alpha: float = 1.0, scope: str = "factor", keep: str = "ternary") -> Adapter:
    """The adapter with ⌊density · D⌋ trained values left of the D of each scope, the first among equals; fewer where fewer are not zero.

    Args:
        density: k, of (0, 1], read as the decimal that it is written as. The paper tries 0.05 to 0.5; 0.2 in most of its tables.
        alpha: α. The paper chooses among 0.5 to 10 on validation data, and finds 1 good without for large bases; small ones want more.
        scope: adapter, factor or tensor.
        keep: ternary, mean or magnitude.

    Raises BadParameter; NotExportable for an adapter without such values, or with a start that it subtracts; AdapterMismatch for values
    that are not finite.
    """
    _check(density, alpha, scope, keep)
    values, groups = trained(adapter), dict[str, dict[str, Tensor]]()
    for name in sorted(values):
        groups.setdefault(SCOPES[scope](name), {})[name] = values[name]
    small: dict[str, Tensor] = {}
    for group in groups.values():
        small |= _compressed(group, density, alpha, keep)
    tensors = {**adapter.tensors, **small}
    record = {"density": density, "alpha": alpha, "scope": scope, "keep": keep, "sha256": digest(tensors)}
    kept = {name: value for name, value in adapter.meta.items() if name != MEASURED}
    return dataclasses.replace(adapter, tensors=tensors, meta={**kept, META: record})


def compressed(adapter: Adapter) -> dict[str, Any] | None:
    """The settings that gave the adapter its tensors. None where they have changed since, whatever its meta still says: what a meta holds
    stays with an adapter that is trained on, or cut."""
    record = adapter.meta.get(META)
    if not isinstance(record, dict) or record.get("sha256") != digest(adapter.tensors):
        return None
    return {name: value for name, value in record.items() if name != "sha256"}


def trained(adapter: Adapter) -> dict[str, Tensor]:
    """What was trained at the sites and in their pool, by name; no vectors where there are matrices, too. Raises as `compress` does."""
    pool, deltas = adapter.build("meta")
    started = [name for name, delta in deltas.items() if delta.provides & STARTS]
    if started:
        raise NotExportable(
            f"{adapter.recipe.name} subtracts its own start at {len(started)} sites ({started[0]}, …), which would not cancel against a "
            "compressed rest: `lorakit mix ADAPTER --weights 1 --space delta+svd:R --out FOLDER` writes a plain LoRA of rank R to compress"
        )
    parts: dict[str, Delta | Shared] = {**deltas, **({} if pool is None else {f"{ROOT}.{POOL}": pool})}
    found: dict[str, Tensor] = {}
    for path, part in parts.items():
        found |= _learned(path, part, adapter.tensors)
    if not found:
        raise NotExportable(f"{adapter.recipe.name} has nothing to compress: it trains no values at sites, nor shared by them")
    broken = [name for name, t in found.items() if not torch.isfinite(t).all()]
    if broken:
        raise AdapterMismatch(f"tensor {broken[0]} holds NaN or infinite values; the adapter is damaged or its training diverged")
    return found


def _learned(path: str, part: Delta | Shared, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    every = {name: tensors[name] for name in (f"{path}.{short}" for short in sorted(part.trains))}
    matrices = {name: t for name, t in every.items() if t.ndim > 1}
    return {name: t for name, t in (matrices or every).items() if t.numel()}  # a site may have been left without rank


def largest(tau: Tensor, n: int) -> Tensor:
    """Which n >= 1 of the values [D] are the largest in size: [D], bool; among equals the first ones."""
    size = tau.abs()
    least = float(np.partition(size.numpy(), len(tau) - n)[len(tau) - n])
    kept = size > least
    equal = (size == least).nonzero().flatten()
    kept[equal[: n - int(kept.sum())]] = True
    return kept


@dataclasses.dataclass(frozen=True)
class Report:
    """What compressing cost and saved."""

    values: int
    """D of all scopes together."""
    kept: int
    """Of them not zero."""
    tensor_bytes: int
    """Of the whole adapter before, in its own dtypes."""
    file_bytes: int
    """Of the file with all of it now."""
    bits: float
    """A compressed value takes in that file, without its part of the index."""
    entropy: float
    """The fewest bits for it if each place were as likely to be kept as any other."""
    error: float
    """‖ΔW − ΔW̃‖ / ‖ΔW‖, Frobenius, over all sites."""
    sites: int
    lost: list[str]
    """Sites that had an update and have none any more: all values of one of their factors lay below the threshold."""


def report(before: Adapter, after: Adapter, folder: str | Path) -> Report:
    """Of an adapter and its compressed form, which lies in a folder."""
    path = found_weights(locate(folder, WEIGHTS), Path(folder), WEIGHTS)
    coded, names = sparse.Coded(read(path), path).entries, sorted(trained(after))
    entries = [coded[name] for name in names]
    values, kept = sum(math.prod(entry.shape) for entry in entries), sum(entry.kept for entry in entries)
    found = _all_norms(before, after)
    payload = sum(entry.kept * (1 if entry.sizes == "one" else 8 * entry.itemsize) for entry in entries)
    return Report(
        values,
        kept,
        sum(before.tensors[name].nbytes for name in before.tensors),
        path.stat().st_size,
        8 * sum(entry.nbytes for entry in entries) / values,
        entropy(kept / values, payload / max(1, kept)),
        _relative(found),
        len(before.sites),
        [site.name for site, norms in zip(before.sites, found, strict=True) if norms.after <= NOTHING * norms.before and norms.before > 0],
    )


def entropy(k: float, bits: float = 1.0) -> float:
    """Bits a value when a share k of them is kept, in any places, with `bits` for each: −(1−k) log₂(1−k) − k log₂ k + k · bits."""
    return k * bits - sum(share * math.log2(share) for share in (k, 1 - k) if share > 0)


def relative_error(before: Adapter, after: Adapter) -> float:
    """‖ΔW − ΔW̃‖ / ‖ΔW‖, Frobenius, over all sites: of s·B·A alone where the method also rescales W, and of the sites' tensors where the
    weights do not change (modules, biases)."""
    return _relative(_all_norms(before, after))


def _relative(found: Sequence["_Norms"]) -> float:
    error, whole = math.hypot(*(norms.error for norms in found)), math.hypot(*(norms.before for norms in found))
    return error / whole if whole > 0 else 0.0  # an update of zero stays one


def _all_norms(before: Adapter, after: Adapter) -> list["_Norms"]:
    old, new = before.opened(), after.opened()
    return [_norms(old(site), new(site)) for site in before.sites]


def _check(density: float, alpha: float, scope: str, keep: str) -> None:
    if not 0 < density <= 1:
        raise BadParameter(f"density={density}; expected 0 < density <= 1, the share of the values that is kept (0.2 for 20 %)")
    if not 0 < alpha < math.inf:
        raise BadParameter(f"alpha={alpha}; expected a positive factor, 1 for the size of the standard deviation")
    for name, value, known in (("scope", scope, SCOPES), ("keep", keep, SIZES)):
        if value not in known:
            raise BadParameter(f"{name}={value!r}; expected {', '.join(known)}")


def _compressed(tensors: Mapping[str, Tensor], density: float, alpha: float, keep: str) -> dict[str, Tensor]:
    """The tensors of one τ."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    tau = torch.cat([t.detach().cpu().to(wide).flatten() for t in tensors.values()])  # [D]
    n = math.floor(Fraction(str(density)) * len(tau))
    if n == 0:
        raise BadParameter(f"density={density} keeps none of the {len(tau)} values of {_named(tensors)}: take more, or a wider scope")
    kept = largest(tau, n)
    size = alpha * SIZES[keep](tau, kept)
    rows = torch.where(kept, tau.sign() * size, 0.0).split([t.numel() for t in tensors.values()])
    small = {name: row.view(t.shape).to(t.dtype) for row, (name, t) in zip(rows, tensors.items(), strict=True)}
    left = sum(int(t.count_nonzero()) for t in small.values())
    if left != int(tau[kept].count_nonzero()) or not all(torch.isfinite(t).all() for t in small.values()):
        raise BadParameter(
            f"alpha={alpha} makes the kept values of {_named(tensors)} {size.max().item():.3g}, which is no number for their dtype; "
            "take another alpha, or keep mean"
        )
    return small


def _named(tensors: Mapping[str, Any]) -> str:
    first = next(iter(tensors))
    return first if len(tensors) == 1 else f"{len(tensors)} tensors ({first}, …)"


def _deviation(tau: Tensor) -> Tensor:
    """With D − 1 in the denominator, as the authors' code has it; 0 for a single value."""
    return tau.double().std() if len(tau) > 1 else tau.new_zeros((), dtype=torch.float64)


class _Norms(NamedTuple):
    """Of one site, Frobenius."""

    error: float
    """‖ΔW − ΔW̃‖."""
    before: float
    """‖ΔW‖."""
    after: float
    """‖ΔW̃‖."""


def _norms(old: Delta, new: Delta) -> _Norms:
    """By factors where there are some: [B, −B̃] · [A; Ã] is the difference."""
    f, g = (delta.factors() if delta.linear and delta.bound() else None for delta in (old, new))
    if f is not None and g is not None:
        A, B = torch.cat([f.A, g.A], -2), torch.cat([f.s * f.B.double(), -g.s * g.B.double()], -1)
        return _Norms(norm(Factors(A, B, 1.0)), norm(f), norm(g))
    one, other = (_dense(delta) for delta in (old, new))
    return _Norms((one - other).norm().item(), one.norm().item(), other.norm().item())


def _dense(delta: Delta) -> Tensor:
    """ΔW; the tensors where the weight does not change."""
    if delta.linear and delta.bound():
        return delta.weight().double()
    return torch.cat([p.detach().double().flatten() for p in delta.parameters()])
