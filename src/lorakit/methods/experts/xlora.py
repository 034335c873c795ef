"""X-LoRA: one gate mixes finished LoRAs, token by token, after a look at what the base alone makes of the text.

    H = the base's last hidden state, adapters off        H: [b, t, d]
    λ = MLP(H)        [b, t, n, N]: N adapters, n = 1, or one gate for each of the n adapted sites with `layerwise`
    g = softmax(λ / τ)        y = W x + c Σ_i g_i s_i B_i A_i x

MLP: `depth` 1 is a linear layer; depth D has D − 1 hidden layers of width `size`, each followed by relu and dropout `gate_dropout`.
`softmax` False leaves λ as it is. `top_k` keeps a token's k largest gates and zeroes the rest, which are not made up for; `softmax_top_k`
gives the kept ones a softmax of their own (in place of `softmax`). `temperature` τ, `weight` c.
`pass_scale` v lets the adapters act in the first pass, at v in place of g; 0 leaves it to the base.
`adapters`: folders of LoRAs, lorakit's or PEFT's, whose sites and ranks may differ; they are copied into this adapter, which needs the
folders no more. Where one has no site it adds nothing. They are frozen unless `train_adapters`. Without folders there are `experts` fresh
LoRAs of rank r at `sites`, which are trained with the gate.
Trained: the gate, (d + 1) N n at depth 1, and the adapters where said. A gate's layer starts as U(±1/√fan_in). Never merged: the gates
depend on the input. `lorakit.adapters.expert.expert(adapter, i)` takes one adapter out again. In decoding the first pass has a cache of its
own behind the forward's (parts/patches/prepass.py), so each token costs two passes. The output head, which runs at some tokens only, is no
site.
Unlike PEFT: a gate of exactly zero that is among the top k stays in; both softmaxes at once are refused.
Defaults: PEFT's (depth 1, size 2048, gate_dropout 0.2, τ 1, v 0, c 1); 4 fresh experts are our choice.
References: arXiv:2402.07148; code EricLBuehler/xlora; survey 4.2.

Use it when you have finished adapters of several skills and texts that need them mixed token by token. Each token costs two passes and
merging is impossible; for one fixed mixture `lorakit mix-search` is cheaper and yields a plain adapter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.base import Base
from lorakit.core.context import Cell, Ctx
from lorakit.core.delta import Delta, Factors, stack
from lorakit.core.errors import BadParameter
from lorakit.core.events import Assembled
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.shared import Shared, refuse_shapes
from lorakit.core.site import Site, Where, select
from lorakit.parts.deltas.experts import Experts, ExpertsSpec, Form
from lorakit.parts.inits.experts import FreshExperts
from lorakit.parts.inits.random import set_
from lorakit.parts.patches.prepass import Prepass, told
from lorakit.parts.routers import softmax as routing


class Places(Shared):
    """Which of the gates is a site's; there are no tensors."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.of = {site.name: i for i, site in enumerate(sites)}


class Gated(Experts):
    """A site's experts, each with a scale of its own: `scales` [N]. Where one has a lower rank than others, the rest of it is zero."""

    def __init__(self, site: Site, form: Form, place: int, *, open_: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site, form, dtype=dtype, device=device)
        self.place, self.open = place, open_
        self.register_buffer("scales", torch.full((form.experts,), self.s, dtype=dtype, device=device))
        self.s = 1.0  # it is the gates'

    def gates(self, x: Tensor, ctx: Ctx) -> Tensor:
        g = told(ctx, self.site.name)
        lead = x.shape[:-1] if x.is_floating_point() else x.shape
        if g.ndim > 1:
            g = g[..., min(self.place, g.shape[-2] - 1), :].reshape(*lead, len(self.A))
        return g * self.get_buffer("scales")

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        if self.open and "A" in shapes:
            self.r = shapes["A"][1]
            for name, shape in (("A", (len(self.A), self.r, self.A.shape[2])), ("B", (len(self.B), self.B.shape[1], self.r))):
                old = self.get_parameter(name)
                setattr(self, name, nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad))
        refuse_shapes(self, shapes)

    def experts(self) -> tuple[Factors, ...]:
        pairs = zip(self.A, self.B, self.get_buffer("scales").tolist(), strict=True)
        return tuple(Factors(A, B, s) for A, B, s in pairs)


@dataclass(frozen=True)
class GatedSpec(ExpertsSpec):
    """Experts under one gate. `open_`: their ranks are the folders'."""

    form: Form
    layerwise: bool = False
    open_: bool = False

    def pool(
        self, sites: Sequence[Site], *, every: Sequence[Site], rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Places | None:
        return Places(sites) if self.layerwise else None

    def build(self, site: Site, *, pool: Shared | None, dtype: torch.dtype, device: torch.device) -> Gated:
        place = pool.of[site.name] if isinstance(pool, Places) else 0
        return Gated(site, self.form, place, open_=self.open_, dtype=dtype, device=device)

    def check(self, sites: Sequence[Site]) -> None:
        heads = [site.name for site in sites if site.role == "head"]
        if heads:
            raise BadParameter(f"site {heads[0]!r} is an output head, which runs at some tokens only; X-LoRA's gates are for all of them")
        if not self.open_:
            self.form.rank.check(sites)

    def count(self, site: Site) -> int:
        return self.form.count(site)


@dataclass(frozen=True)
class Loaded:
    """Each expert's factors, by site name."""

    found: tuple[Mapping[str, Factors], ...] = field(compare=False)
    requires: frozenset[str] = Experts.provides

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        assert isinstance(delta, Gated)
        A, B, scales = stack([factors.get(site.name) for factors in self.found], site.d_out, site.d_in)
        delta.fit({"A": A.shape, "B": B.shape, "scales": scales.shape})
        for mine, value in ((delta.A, A), (delta.B, B), (delta.get_buffer("scales"), scales)):
            set_(mine, value)


@dataclass(frozen=True)
class FromFolders(Assembled):
    """Experts that are finished adapters."""

    folders: tuple[str, ...]
    requires: frozenset[str] = Experts.provides

    def fit(self, found: Sequence[Mapping[str, Factors]]) -> Loaded:
        return Loaded(tuple(found))


class Gate(Prepass):
    """W1, c1, W2, c2, …: the layers of the MLP."""

    def __init__(self, model: nn.Module, sites: int, spec: "GateSpec", cell: Cell, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model, cell)
        self.spec, self.shape = spec, (sites if spec.layerwise else 1, spec.experts)
        self.draws, self.stream = spec.depth > 1 and spec.dropout > 0, random.stream(spec.name)
        for i, (d_out, d_in) in enumerate(spec.shapes(model, sites), 1):
            self.register_parameter(f"W{i}", nn.Parameter(torch.zeros(d_out, d_in, dtype=dtype, device=device)))
            self.register_parameter(f"c{i}", nn.Parameter(torch.zeros(d_out, dtype=dtype, device=device)))
        self.trains = frozenset(name for name, _ in self.named_parameters(recurse=False))
        if spec.pass_scale:
            self.meanwhile = spec.chosen(torch.full((spec.experts,), spec.pass_scale, dtype=dtype, device=device))

    def decide(self, hidden: Tensor) -> Tensor:
        h = hidden.to(torch.promote_types(hidden.dtype, self.get_parameter("W1").dtype))
        for i in range(1, self.spec.depth + 1):
            h = F.linear(h, self.get_parameter(f"W{i}"), self.get_parameter(f"c{i}"))
            if i < self.spec.depth:
                h = self._dropped(h.relu(), i)
        logits = h.unflatten(-1, self.shape)
        return self.spec.chosen(routing.dense(logits, self.spec.temperature) if self.spec.softmax else logits)

    def _dropped(self, h: Tensor, i: int) -> Tensor:
        return random.dropout(h, self.cell.value.key, self.stream + i, self.spec.dropout) if self.training and self.draws else h


@dataclass(frozen=True)
class GateSpec:
    """The gate of `experts` experts at the sites that `where` selects."""

    experts: int
    where: Where
    depth: int
    size: int
    dropout: float
    layerwise: bool
    softmax: bool
    temperature: float
    top_k: int | None
    softmax_top_k: bool
    pass_scale: float
    weight: float
    name: str = "gate"
    requires: frozenset[str] = frozenset()
    kept: str = "its gate reads every text before the adapters do"

    def chosen(self, g: Tensor) -> Tensor:
        """c times what is left of the gates [.., N]."""
        mask = routing.largest(g, self.experts if self.top_k is None else self.top_k)
        return self.weight * (routing.shared if self.softmax_top_k else routing.kept)(g, mask)

    def shapes(self, model: nn.Module, sites: int) -> list[tuple[int, int]]:
        """(d_out, d_in) of each layer."""
        d: int = model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
        widths = [d, *[self.size] * (self.depth - 1), self.experts * (sites if self.layerwise else 1)]
        return [(d_out, d_in) for d_in, d_out in pairwise(widths)]

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Gate:
        gate = Gate(model, len(sites), self, cell, dtype=dtype, device=device)
        for name, p in gate.named_parameters():
            bound = 1 / math.sqrt(gate.get_parameter("W" + name[1:]).shape[1])
            set_(p, torch.empty(p.shape).uniform_(-bound, bound, generator=rng))
        return gate

    def count(self, model: nn.Module) -> int:
        sites = len(select(model, self.where)) if self.layerwise else 0
        return sum(d_out * (d_in + 1) for d_out, d_in in self.shapes(model, sites))


@method("xlora", paper="arXiv:2402.07148", survey="4.2", kind="router")
def xlora(
    adapters: tuple[str, ...] = (),
    experts: int = 4,
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    train_adapters: bool = False,
    depth: int = 1,
    size: int = 2048,
    gate_dropout: float = 0.2,
    layerwise: bool = False,
    softmax: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    softmax_top_k: bool = False,
    pass_scale: float = 0.0,
    weight: float = 1.0,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
) -> Method:
    """A gate, trained to mix finished LoRAs token by token after a pass over the base."""
    n = len(adapters) or experts
    random.check_dropout(gate_dropout)
    if min(depth, size) < 1 or temperature <= 0 or (top_k is not None and not 1 <= top_k <= n):
        raise BadParameter(
            f"depth={depth}, size={size}, temperature={temperature}, top_k={top_k}: expected depth and size from 1 on, a positive "
            f"temperature, and top_k from 1 to the number of experts, {n}"
        )
    if softmax and softmax_top_k:
        raise BadParameter("softmax and softmax_top_k together are a softmax of a softmax; set softmax=False for the one among the top k")
    if adapters and sites != "all-linear":
        raise BadParameter("adapters bring their own sites; leave sites out, or adapters for fresh experts there")
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    form = Form(n, rank, dropout, trained=train_adapters or not adapters)
    gate = GateSpec(
        n, sites, depth, size, gate_dropout, layerwise, softmax, temperature, top_k, softmax_top_k, pass_scale, weight
    )  # fmt: skip
    init = FromFolders(adapters) if adapters else FreshExperts(router=False)
    return Method(GatedSpec(form, layerwise, bool(adapters)), init, sites=sites, patches=(gate,), identity=not adapters)
