"""One module's low-rank pair, as PEFT stores it: ΔW = s · B · diag(E) · A, rescaled row by row by m where there is one.

A part of a fused weight (c_attn[q]) becomes the whole one: its B is padded with rows of zeros, and the ranks of several parts
follow each other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.adapter import Adapter
from lorakit.core.base import Base, base_of
from lorakit.core.combine import Add, AddSpec
from lorakit.core.delta import Delta
from lorakit.core.errors import NotExportable
from lorakit.core.layer import Branch
from lorakit.core.site import Kind, Site


@dataclass(frozen=True)
class Pair:
    """A [r, d_in], B [d_out, r], their scale; E of AdaLoRA, m of DoRA."""

    kind: Kind
    A: Tensor
    """r × d_in; at experts E × r × d_in."""
    B: Tensor
    """d_out × r; at experts E × d_out × r."""
    s: float
    E: Tensor | None = None
    """r × 1."""
    m: Tensor | None = None
    """d_out."""

    @property
    def r(self) -> int:
        """The rank of the pair."""
        return int(self.A.shape[-2])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        named = {"A": self.A, "B": self.B, "E": self.E, "m": self.m}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def change(adapter: Adapter, site: Site, delta: Delta, model: nn.Module | None) -> Tensor:
    """A site's change of the weight, d_out × d_in; a method that rescales W needs the model for it."""
    method = adapter.method()
    if isinstance(method.combine, AddSpec):
        return delta.weight()
    if model is None:
        raise NotExportable(
            f"{adapter.recipe.name} rescales W itself: its change of W is known with the base only; give the model (--model)"
        )
    base = seen(model, site, delta)
    combine = method.combine.build(site, base, delta.to(base.device))
    combine.load_state_dict({k: v for k, v in adapter.of(site).items() if k in combine.state_dict()})
    return combine.weight(base, delta).detach().float().cpu()


def seen(model: nn.Module, site: Site, delta: Delta) -> Base:
    """The base as the site sees it: of a fused weight, its own rows."""
    return Branch(site, base_of(model.get_submodule(site.module), site.attribute), delta, Add()).base


def by_module(found: list[tuple[Site, Pair]], model: nn.Module | None) -> tuple[dict[str, Pair], bool]:
    """One pair a module, and whether no scale had to be moved into B for it."""
    groups: dict[str, list[tuple[Site, Pair]]] = {}
    for site, pair in found:
        groups.setdefault(site.whole, []).append((site, pair))
    even = all(len({pair.s for _, pair in group}) == 1 for group in groups.values())
    return {name: _joined(group, model) for name, group in groups.items()}, even


def _joined(group: list[tuple[Site, Pair]], model: nn.Module | None) -> Pair:
    (first, pair), *others = group
    if first.rows is None and not others:
        return pair
    if model is None:
        raise NotExportable(
            f"{first.name} is part of a fused weight, which PEFT adapts as a whole: give the model (--model) to know its shape"
        )
    base = base_of(model.get_submodule(first.module), first.attribute)
    s = max((p.s for _, p in group), key=abs) or 1.0
    B = torch.cat([_spread(p.B * (p.s / s), site, base.shape[0]) for site, p in group], dim=-1)
    m = None
    if pair.m is not None:  # rows of no part keep their own norm
        m = base.dense(torch.float32).norm(dim=1).cpu()
        for site, p in group:
            m[rows_of(site)] = p.m
    return Pair(pair.kind, torch.cat([p.A for _, p in group], dim=-2), B, s, m=m)


def rows_of(site: Site) -> Tensor:
    """The output rows of a site in its module's weight."""
    return torch.cat([torch.arange(r.start, r.stop) for r in site.rows or (range(site.d_out),)])


def _spread(B: Tensor, site: Site, d_out: int) -> Tensor:
    """B of a part as B of the whole: [.., d_out, r]."""
    return torch.zeros(*B.shape[:-2], d_out, B.shape[-1]).index_copy(-2, rows_of(site), B)
