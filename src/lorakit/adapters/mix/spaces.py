"""In which coordinates a mixer sees the updates of a site.

delta         ΔW itself. Sums are exact at rank Σ r; what is put together entry by entry is cut to that rank, or to q (`+svd:q`)
core          Uᵀ ΔW V, in bases of all B and of all A: R × R, lossless, and the result keeps rank R (arXiv:2509.17786)
knots         Uᵀ ΔW, in the left singular basis of [ΔW₁, ΔW₂, …]; the result keeps rank R (arXiv:2410.19735)
factor        A and B apart, each times √|w s|: PEFT's `linear`, `ties`, `dare_*`, `magnitude_prune`
factor:both   A and B apart, each times w √|s|: LoRAHub. One adapter with weight w comes out times w², and −1 changes nothing
factor:pem    A times |w| √|s|, B times w √|s|: addition and negation of PEM (arXiv:2306.14870), where ⊖ turns B alone

The last three make cross terms B_i A_j and are there to reproduce papers; everything else is a function of the ΔW alone. The sign of a
singular vector is arbitrary, but no mixer sees it: each commutes with turning the signs of a row or a column of all its matrices. Core
takes balanced factors, √σ on both sides, so that it does not depend on how ΔW was split into A and B; the published code takes them as
they were trained.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.mix.keep import Draw, Rows
from lorakit.adapters.mix.mixers import Rule
from lorakit.adapters.update import decomposed, joined, low_rank, truncated
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter, Incompatible, did_you_mean
from lorakit.core.random import generator, stream

TINY = 1e-10
"""Singular values below this share of the largest are zero."""


class Here(NamedTuple):
    """What is put together at one site: the adapters that have an update there."""

    name: str
    parts: Sequence[Factors]
    weights: Sequence[float]
    stats: Sequence[Tensor | None]
    numbers: Sequence[int]
    """Their places among all adapters."""
    rule: Rule
    seed: int

    @property
    def limit(self) -> int:
        """Σ r, or as much as the matrix has."""
        return min(sum(len(f.A) for f in self.parts), self.parts[0].A.shape[1], len(self.parts[0].B))


def in_delta(here: Here, q: int | None) -> tuple[Factors, float]:
    """(the update, the norm of what was cut off)."""
    if here.rule.linear:
        return _cut(_scaled(joined(here.parts, here.weights), here.rule.scale), q)
    return low_rank(whole(here, None), q or here.limit, generator(here.seed, here.name))


def in_core(here: Here, q: int | None) -> tuple[Factors, float]:
    if here.rule.linear:
        return in_delta(here, q)
    _refuse_importance(here)
    pairs = [_balanced(f) for f in here.parts]
    U, V = _basis([B for _, B in pairs]), _basis([A.T for A, _ in pairs])
    M = _assembled(here, [Rows(U.T @ B, A @ V) for A, B in pairs], here.weights)
    return _cut(_scaled(Factors(V.T, U @ M.double(), 1.0), here.rule.scale), q)


def in_knots(here: Here, q: int | None) -> tuple[Factors, float]:
    if here.rule.linear:
        return in_delta(here, q)
    _refuse_importance(here)
    Q, R = torch.linalg.qr(torch.cat([f.s * f.B.double() for f in here.parts], 1))
    rights = [torch.linalg.qr(f.A.double().T) for f in here.parts]  # A = Rᵀ Qᵀ
    sides = [r @ right.R.T for r, right in zip(R.split([len(f.A) for f in here.parts], 1), rights, strict=True)]
    U, S, Vh = torch.linalg.svd(torch.cat(sides, 1), full_matrices=False)
    kept = TINY * S.max() < S
    shares = (S[kept, None] * Vh[kept]).split([side.shape[1] for side in sides], 1)
    rows = [Rows(v, right.Q.T) for v, right in zip(shares, rights, strict=True)]
    merged = _assembled(here, rows, here.weights).double()
    return _cut(_scaled(Factors(merged, (Q @ U)[:, kept], 1.0), here.rule.scale), q)


def in_roots(here: Here, q: int | None) -> tuple[Factors, float]:
    sizes = [w * f.s for f, w in zip(here.parts, here.weights, strict=True)]
    return _apart(here, [math.copysign(math.sqrt(abs(size)), size) for size in sizes], [math.sqrt(abs(size)) for size in sizes], q)


def in_both(here: Here, q: int | None) -> tuple[Factors, float]:
    sizes = [w * math.sqrt(abs(f.s)) for f, w in zip(here.parts, here.weights, strict=True)]
    return _apart(here, sizes, [math.copysign(size, size * f.s) for f, size in zip(here.parts, sizes, strict=True)], q)


def in_pem(here: Here, q: int | None) -> tuple[Factors, float]:
    sizes = [abs(w) * math.sqrt(abs(f.s)) for f, w in zip(here.parts, here.weights, strict=True)]
    return _apart(here, sizes, [math.copysign(size, w * f.s) for f, w, size in zip(here.parts, here.weights, sizes, strict=True)], q)


def whole(here: Here, q: int | None) -> Tensor:
    """The change of the weight in delta space, cut to rank q where that is given and else not at all: fp32."""
    if here.rule.linear or q is not None:
        f, _ = in_delta(here, q)
        return (f.s * f.B @ f.A).float()
    return _assembled(here, [Rows(f.B, f.A, f.s) for f in here.parts], here.weights).mul_(here.rule.scale)


Space = Callable[[Here, int | None], tuple[Factors, float]]
SPACES: dict[str, Space] = {
    "delta": in_delta,
    "core": in_core,
    "knots": in_knots,
    "factor": in_roots,
    "factor:both": in_both,
    "factor:pem": in_pem,
}


def space_of(text: str) -> tuple[Space, int | None]:
    """(the space, q) of `delta`, `delta+svd:16`, … Raises BadParameter."""
    name, plus, cut = text.partition("+")
    if name not in SPACES:
        raise BadParameter(f"no space is called {name!r}. {did_you_mean(name, SPACES)}")
    if not plus:
        return SPACES[name], None
    word, _, number = cut.partition(":")
    if word != "svd" or not number.isdigit() or int(number) < 1:
        raise BadParameter(f"space {text!r}: expected +svd:Q with a rank Q of at least 1, as in {name}+svd:16")
    return SPACES[name], int(number)


# ---------------------------------------------------------------------------------------------------------------------- the steps
def _assembled(here: Here, rows: Sequence[Rows], weights: Sequence[float], side: str = "") -> Tensor:
    """What the rule makes of one matrix of each adapter, some rows at a time: fp32."""
    draws = [Draw(here.seed, stream(f"{here.name}/{i}{side}")) for i in here.numbers]
    out, at = torch.empty(rows[0].shape), 0
    for blocks in zip(*(here.rule.keep(r, draw) for r, draw in zip(rows, draws, strict=True)), strict=True):
        values, end = torch.stack(blocks), at + len(blocks[0])
        out[at:end] = here.rule.merge(values, _weights(here, weights, slice(at, end)))
        at = end
    return out


def _weights(here: Here, weights: Sequence[float], rows: slice) -> Tensor:
    """[N], or with an importance for every entry [N, rows, columns]."""
    w = torch.tensor(weights)
    if here.rule.needs != "fisher":
        return w
    return torch.stack([importance[rows].float() * w_i for importance, w_i in zip(here.stats, w, strict=True)])  # type: ignore[index]


def _apart(here: Here, for_A: Sequence[float], for_B: Sequence[float], q: int | None) -> tuple[Factors, float]:
    _refuse_importance(here)
    ranks = {len(f.A) for f in here.parts}
    if len(ranks) > 1:
        raise Incompatible(
            f"{here.name}: factor space puts A and B together entry by entry, which ranks {sorted(ranks)} do not allow; use space='delta'"
        )
    ones = [1.0] * len(here.parts)
    A = _assembled(here, [Rows(f.A.float() * c) for f, c in zip(here.parts, for_A, strict=True)], ones, "/A")
    B = _assembled(here, [Rows(f.B.float() * c) for f, c in zip(here.parts, for_B, strict=True)], ones, "/B")
    return _cut(_scaled(Factors(A, B, 1.0), here.rule.scale), q)


def _refuse_importance(here: Here) -> None:
    if here.rule.needs == "fisher":
        raise Incompatible("the Fisher information is that of W's entries, and so of ΔW's: fisher works in space='delta' alone")


def _balanced(f: Factors) -> tuple[Tensor, Tensor]:
    """A, B with ΔW = B A, both sides having √σ."""
    U, S, V = decomposed(f)
    return S.sqrt()[:, None] * V.T, U * S.sqrt()


def _basis(columns: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis [d, k] of all these columns [d, r]: their left singular vectors."""
    Q, R = torch.linalg.qr(torch.cat(list(columns), 1))
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    basis: Tensor = (Q @ U)[:, TINY * S.max() < S]
    return basis


def _scaled(f: Factors, scale: float) -> Factors:
    return f._replace(B=f.B * scale)


def _cut(f: Factors, q: int | None) -> tuple[Factors, float]:
    return (f, 0.0) if q is None or q >= len(f.A) else truncated(f, q)
