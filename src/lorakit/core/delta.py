"""A delta owns A and B: the trained part of an adapted site, ΔW = s · B · G · A, or any other linear change of the weight."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.context import Ctx
from lorakit.core.errors import NotMergeable
from lorakit.core.shared import Shared, refuse_shapes
from lorakit.core.site import MODULES, Kind, Site
from lorakit.ops import reference
from lorakit.ops.mask import Mask


class Factors(NamedTuple):
    """ΔW = s · B · A exactly, where `gain` is None; else W' = gain ∘ (W + s · B · A) row by row (DoRA)."""

    A: Tensor
    """r × d_in; a gate is already folded in."""
    B: Tensor
    """d_out × r."""
    s: float
    gain: Tensor | None = None
    """d_out, or None."""


class Product(NamedTuple):
    """What a forward multiplies by: ΔW = s · diag(b) · B · diag(g) · A, the scale and vectors not folded in."""

    A: Tensor
    """r × d_in."""
    B: Tensor
    """d_out × r."""
    s: float = 1.0
    g: Tensor | None = None
    """r, or None."""
    b: Tensor | None = None
    """d_out, or None."""


def stack(found: Sequence[Factors | None], d_out: int, d_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """Several changes of one weight, at most each of its own rank, as A [N, r, d_in], B [N, d_out, r] and scales [N] of the largest rank r:
    what a smaller one lacks is zero, as is one that there is none of."""
    r, like = max(len(f.A) for f in found if f is not None), next(f.A for f in found if f is not None)
    A, B = like.new_zeros(len(found), r, d_in), like.new_zeros(len(found), d_out, r)
    scales = torch.ones(len(found), dtype=torch.float64, device=like.device)
    for i, f in enumerate(found):
        if f is not None:
            A[i, : len(f.A)], B[i, :, : len(f.A)], scales[i] = f.A.detach(), f.B.detach(), f.s
    return A, B, scales


class Delta(nn.Module, ABC):
    """A site's trained change of the weight. Its tensors are its state; `trains` says which of them learn."""

    provides: frozenset[str] = frozenset()
    trains: frozenset[str] = frozenset()
    draws: bool = False
    """Whether forward in training draws masks, so that every step needs a fresh context."""
    linear: bool = True
    """Whether it is a change of the weight. A nonlinear module has no weight() and cannot be merged."""
    absorbed: int = 0
    """How much of it the base holds at the moment; forward, weight and factors are what remains (LowRank's legs)."""
    reads: tuple[str, ...] = ()
    """Paths of modules of other sites whose input in the same forward it wants; found in `ctx.memo`."""

    p: float = 0.0
    """Probability of dropping an entry of the input in training; `stream` tells this site's masks from others'."""
    stream: Tensor

    def mask(self, x: Tensor, ctx: Ctx) -> Mask | None:
        """What dropout keeps of x in training; None for all of it. Ids cannot be dropped, so an embedding ignores it."""
        return Mask(ctx.key, self.stream, self.p) if self.p > 0 and self.training and x.is_floating_point() else None

    def drop(self, x: Tensor, ctx: Ctx) -> Tensor:
        """The input as the delta sees it in training: its own dropout."""
        mask = self.mask(x, ctx)
        return x if mask is None else mask.drop(x)

    def product(self, ctx: Ctx) -> Product | None:
        """What this forward multiplies by; None in a delta of another form, which has a forward of its own."""
        return None

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        """x ΔWᵀ of an already dropped x: [.., d_in] -> [.., d_out] (ids [..] for an embedding)."""
        f = self.product(ctx)
        if f is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a product nor a forward of its own")
        return reference.low_rank(x, f.A, f.B, f.s, f.g, f.b)

    def weight(self) -> Tensor:
        """ΔW: d_out × d_in, in the delta's own dtype. Raises Incompatible when the delta is no change of the weight."""
        raise NotMergeable(f"{type(self).__name__} is no change of the weight: it cannot be merged; keep the adapter attached")

    def bound(self) -> int:
        """An upper bound of rank(ΔW) at any time."""
        raise NotMergeable(f"{type(self).__name__} is no change of the weight: it has no rank")

    def factors(self) -> Factors | None:
        """(A, B, s) with ΔW = s·B·A exactly, or None when the delta has no factors."""
        return None

    def experts(self) -> tuple[Factors, ...]:
        """The ordinary LoRAs that it mixes; none in most deltas."""
        return ()

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        """Take the shapes of a saved adapter's tensors, before they are copied in. Raises AdapterMismatch where they cannot differ."""
        refuse_shapes(self, shapes)

    def roles(self) -> dict[str, str]:
        """{parameter name: role}; optimizers and penalties ask by role."""
        return {name: name for name, _ in self.named_parameters(recurse=False)}


class DeltaSpec(ABC):
    """What a recipe holds: a value that builds the delta of one site, uninitialized, and what an adapter's sites share."""

    @property
    def provides(self) -> frozenset[str]:
        """What inits, combines and controllers may require."""
        return frozenset()

    @property
    def linear(self) -> bool:
        """Whether the deltas are changes of the weight."""
        return True

    @property
    def beyond(self) -> str | None:
        """Why the deltas cannot be merged; None for changes of the weight."""
        return None if self.linear else "its modules are not linear"

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of sites it can build. Other parts have the attribute only where they are capable of more than MODULES."""
        return MODULES

    @abstractmethod
    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Delta:
        """The delta of one site; `pool` is what `pool` below gave."""

    def pool(
        self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Shared | None:
        """What the deltas of one adapter share, initialized; they keep it unregistered. `every`: all sites of the model (at rest, the
        adapter's own)."""
        return None

    def check(self, sites: Sequence[Site]) -> None:
        """Raise BadParameter for what cannot be built at these sites, or names none of them."""
        return None

    @abstractmethod
    def count(self, site: Site) -> int:
        """Trainable parameters at this site, in closed form."""

    def count_shared(self, sites: Sequence[Site]) -> int:
        """Trainable parameters of the pool, in closed form."""
        return 0
