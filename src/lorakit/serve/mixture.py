"""Finished adapters side by side on one base, mixed while it runs: every sample has weights g of its own, which may change from forward
to forward.

    outputs   y = W x + Σ_i g_i s_i B_i A_i x                            what the adapters add, weighted
    factors   y = W x + (Σ_i g_i √s_i B_i) (Σ_j g_j √s_j A_j) x          LoraRetriever's "fusion" (arXiv:2402.09997): cross terms B_i A_j

g [b, N] counts for all tokens of a row, or [1, N] for all rows. At each site the adapters' factors are stacked, A [N, r, d_in] and
B [N, d_out, r], lower ranks and missing sites filled up with zeros; each has its own s. `factors` adds up A and B entry by entry and so
needs one rank a site, as mixing in factor space does; with g = 1/k it is `mix(..., space="factor:both")`. No sample's own Â and B̂ are
formed: both cost N ranks a token, whatever the weights are. Stacked experts and output heads are refused.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.adapters.mix.parts import Sources
from lorakit.core.adapter import Adapter
from lorakit.core.attach import Adapted
from lorakit.core.context import Ctx
from lorakit.core.delta import stack
from lorakit.core.errors import AdapterMismatch, BadParameter, Incompatible, did_you_mean
from lorakit.core.fingerprint import check_base
from lorakit.core.method import Method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared
from lorakit.core.site import Site
from lorakit.ops import reference as ops
from lorakit.parts.deltas.experts import Experts, ExpertsSpec, Form

WEIGHTS = "mixture_weights"
NAME = "mixture"


Fold = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A [N, r, d_in], B [N, d_out, r] and scales [N] -> A and B with the scales in them."""


def into_B(A: Tensor, B: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A, s B."""
    return A, B * scales[:, None, None]


def into_both(A: Tensor, B: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """√s A, √s B; of a negative s the sign goes to B."""
    root = scales.abs().sqrt()
    return A * root[:, None, None], B * (root * scales.sign())[:, None, None]


class Stack(NamedTuple):
    """All adapters' factors at one site, in fp32, their scales folded in."""

    A: Tensor
    """[N, r, d_in]."""
    B: Tensor
    """[N, d_out, r]."""
    ranks: tuple[int, ...]
    """Of those that have the site."""


@dataclass(frozen=True)
class Stacked(ExpertsSpec, ABC):
    """Deltas whose experts are finished adapters; `stacks` by site name."""

    stacks: Mapping[str, Stack] = field(compare=False)

    @abstractmethod
    def delta(self, site: Site, form: Form, *, dtype: torch.dtype, device: torch.device) -> Experts:
        """The delta of one site, not filled."""

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Experts:
        A, B, _ = self.stacks[site.name]
        n, r = A.shape[:2]
        delta = self.delta(site, Form(n, Rank.of(r, float(r)), trained=False), dtype=dtype, device=device)
        delta.A.data, delta.B.data = A.to(device, dtype), B.to(device, dtype)
        return delta

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            A, B, _ = self.stacks[site.name]
            if (B.shape[1], A.shape[2]) != (site.d_out, site.d_in):
                raise AdapterMismatch(
                    f"the adapters were made for a base of other shapes: {site.name} is {B.shape[1]} × {A.shape[2]} there, "
                    f"{site.d_out} × {site.d_in} here"
                )

    def count(self, site: Site) -> int:
        return 0


def attach_stacked(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    spec: Callable[[dict[str, Stack]], Stacked],
    *,
    fold: Fold = into_B,
    force: bool = False,
) -> Adapted:
    """Put adapters on a model as one, through the deltas that `spec` makes of their factors.

    Raises NotExportable for an adapter without factors, AdapterMismatch for another base (unless `force`), Incompatible for sites that are
    stacks of experts.
    """
    sources = Sources(list(adapters.values()), force=True)  # what they have in common does not matter: each is compared with the model
    stacks = {site.name: _stack(sources, site, fold) for site in sources.sites if site.experts is None}
    adapted = Adapted(model)
    try:
        for name, adapter in adapters.items():
            _check_base(name, adapter, adapted, force)
        where = tuple(f"re:{re.escape(site.name)}" for site in sources.sites)
        return adapted.add(NAME, Method(spec(stacks), sites=where, identity=False))
    except BaseException:
        adapted.detach()
        raise


def _check_base(name: str, adapter: Adapter, adapted: Adapted, force: bool) -> None:
    try:
        check_base(adapter, adapted.fingerprint, force=force)
    except AdapterMismatch as error:
        raise AdapterMismatch(f"{name}: {error}") from None


def _stack(sources: Sources, site: Site, fold: Fold) -> Stack:
    found = sources.factors(site)
    A, B, scales = stack(found, site.d_out, site.d_in)
    return Stack(*fold(A.float(), B.float(), scales.float()), tuple(len(f.A) for f in found if f is not None))


# ------------------------------------------------------------------------------------------------------------ weights from outside
def weights_in(ctx: Ctx, x: Tensor, site: Site) -> Tensor:
    """The weights in force, [b or 1, 1, …, N], for a site's input [b, .., d_in] (ids [b, ..] at an embedding)."""
    g: Tensor | None = ctx.memo.get(WEIGHTS)
    if g is None:
        raise Incompatible("no weights are in force: run the model within `with mixture.weighted(g):`")
    lead = x.dim() - int(x.is_floating_point())
    if len(g) not in (1, x.shape[0]):
        raise Incompatible(f"{site.name} has {x.shape[0]} rows, and there are weights for {len(g)}; give one row for each, or one for all")
    return g.to(x.device).view(len(g), *[1] * (lead - 1), g.shape[1])


class Outputs(Experts):
    """What the adapters add, weighted."""

    def gates(self, x: Tensor, ctx: Ctx) -> Tensor:
        return weights_in(ctx, x, self.site)


class Factors(Experts):
    """The product of the weighted factors: each B reads the weighted sum of all A x."""

    def gates(self, x: Tensor, ctx: Ctx) -> Tensor:
        return weights_in(ctx, x, self.site)

    def forward(self, x: Tensor, ctx: Ctx) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else self.B.dtype
        g = self.gates(x, ctx).to(dtype).unsqueeze(-1)
        A, B = self.A.to(dtype), self.B.to(dtype)
        z = ops.project(x, A.flatten(0, 1)).unflatten(-1, A.shape[:2])  # [.., N, r]
        z = (z * g).sum(-2, keepdim=True) * g
        return ops.expand(z.flatten(-2), B.transpose(0, 1).flatten(1), self.s)


class Kind(NamedTuple):
    """One of the two forms."""

    delta: Callable[..., Experts]
    fold: Fold
    any_ranks: bool
    """Whether the adapters' ranks at a site may differ."""


FORMS = {"outputs": Kind(Outputs, into_B, any_ranks=True), "factors": Kind(Factors, into_both, any_ranks=False)}


@dataclass(frozen=True)
class MixtureSpec(Stacked):
    """Adapters under weights from outside."""

    kind: Kind = FORMS["outputs"]

    def delta(self, site: Site, form: Form, *, dtype: torch.dtype, device: torch.device) -> Experts:
        return self.kind.delta(site, form, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        super().check(sites)
        for site in sites:
            ranks = sorted(set(self.stacks[site.name].ranks))
            if len(ranks) > 1 and not self.kind.any_ranks:
                raise Incompatible(
                    f"{site.name}: fusion adds up A and B entry by entry, which ranks {ranks} do not allow; mix outputs (mixture) instead"
                )
            if site.role == "head":
                raise Incompatible(
                    f"{site.name!r} is an output head, which runs at some tokens only, so that its rows are not the samples'"
                )


@dataclass(frozen=True)
class Mixture:
    """Adapters on a model, and the handle that holds them. `adapted.detach()` takes them off."""

    adapted: Adapted
    names: tuple[str, ...]

    @contextmanager
    def weighted(self, g: Tensor | Sequence[float]) -> Iterator["Mixture"]:
        """Inside, forwards mix by g: [N] for all rows, or [b, N], one row a sample. Raises BadParameter."""
        found = torch.as_tensor(g, dtype=torch.float32)
        found = found[None] if found.dim() == 1 else found
        if found.dim() != 2 or found.shape[1] != len(self.names) or not found.isfinite().all():
            what = f"a tensor of shape {tuple(found.shape)}" if found.isfinite().all() else "numbers that are not finite"
            raise BadParameter(f"weights of {len(self.names)} adapters are [N] or [b, N] finite numbers; found {what}")
        context: Any = self.adapted.context
        with self.adapted.cell.hold(replace(context, memo={**context.memo, WEIGHTS: found})):
            yield self

    def row(self, weights: Mapping[str, float]) -> Tensor:
        """[N] from weights by name; those that are not named have 0."""
        for name in weights:
            if name not in self.names:
                raise BadParameter(f"no adapter is called {name!r}. {did_you_mean(name, self.names)}")
        return torch.tensor([float(weights.get(name, 0.0)) for name in self.names])


def attach_mixture(model: nn.Module, adapters: Mapping[str, Adapter], *, form: str = "outputs", force: bool = False) -> Mixture:
    """Put adapters on a model, to be mixed by weights that are given with every forward. Raises as `attach_stacked` does."""
    if form not in FORMS:
        raise BadParameter(f"no form is called {form!r}. {did_you_mean(form, FORMS)}")
    kind = FORMS[form]
    adapted = attach_stacked(model, adapters, lambda stacks: MixtureSpec(stacks, kind), fold=kind.fold, force=force)
    return Mixture(adapted, tuple(adapters))
