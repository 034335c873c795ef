"""Arrow: every token chooses among finished LoRAs by itself, with nothing trained (arXiv:2405.11157).

    v_i     the right singular vector of the largest singular value of B_i A_i, by site and adapter: unit length, sign arbitrary
    λ_i     |x · v_i|        y = W x + Σ_i g_i s_i B_i A_i x        g = softmax(λ / τ) over the k largest, 0 elsewhere

v_i is the direction of the input that the adapter answers most. It comes from the factors, exactly (the published code iterates 15 times);
it does not depend on s, nor on how ΔW was split into A and B. An adapter without an update at a site cannot be chosen there.

GenKnowSub (ACL 2025, short papers, 54) takes from an adapter the mean of general ones, before it is routed to:

    delta          ΔW − mean ΔW_j                                       ours: what the words say, of rank r + Σ r_j
    factor:both    s (B − mean B_j)(A − mean A_j) for equal s           as published: needs equal ranks, and makes cross terms
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters.mix import mix
from lorakit.adapters.update import decomposed
from lorakit.core.adapter import Adapter
from lorakit.core.attach import Adapted
from lorakit.core.context import Ctx
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter
from lorakit.core.site import Site
from lorakit.ops import reference as ops
from lorakit.parts.deltas.experts import Experts, Form
from lorakit.parts.routers import softmax as routing
from lorakit.serve.mixture import Stack, Stacked, attach_stacked


def prototype(f: Factors) -> Tensor:
    """v [d_in] of one update, in fp64; zero where the update is."""
    _, S, V = decomposed(f)
    return V[:, 0] if S[0] > 0 else torch.zeros_like(V[:, 0])


class Chosen(Experts):
    """One site's experts, its prototypes V [N, d_in], and which of them stand for no update."""

    def __init__(self, site: Site, form: Form, V: Tensor, spec: "ArrowSpec", *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site, form, dtype=dtype, device=device)
        self.k, self.temperature = spec.k, spec.temperature
        missing = ~V.any(1)
        self.register_buffer("V", V.to(device, dtype))
        self.register_buffer("missing", missing.to(device) if not missing.all() else torch.zeros_like(missing, device=device))

    def gates(self, x: Tensor, ctx: Ctx) -> Tensor:
        V = self.get_buffer("V")
        wide = x.to(torch.promote_types(x.dtype, V.dtype)) if x.is_floating_point() else x
        scores = ops.project(wide, V).abs().masked_fill(self.get_buffer("missing"), -torch.inf)
        return routing.shared(scores / self.temperature, routing.largest(scores, self.k))


@dataclass(frozen=True)
class ArrowSpec(Stacked):
    """Experts that a token's input chooses."""

    k: int = 3
    temperature: float = 1.0

    def delta(self, site: Site, form: Form, *, dtype: torch.dtype, device: torch.device) -> Experts:
        A, B, _ = self.stacks[site.name]
        V = torch.stack([prototype(Factors(a, b, 1.0)) for a, b in zip(A, B, strict=True)])
        return Chosen(site, form, V, self, dtype=dtype, device=device)


def attach_arrow(
    model: nn.Module, adapters: Mapping[str, Adapter], *, k: int = 3, temperature: float = 1.0, force: bool = False
) -> Adapted:
    """Put adapters on a model, of which each token uses the k that fit it at each site. Defaults: the published code's.

    Raises BadParameter, and as `attach_stacked` does.
    """
    if not 1 <= k <= len(adapters) or temperature <= 0:
        raise BadParameter(
            f"k={k}, temperature={temperature}: expected k from 1 to the number of adapters, {len(adapters)}, and a positive temperature"
        )

    def spec(stacks: Mapping[str, Stack]) -> ArrowSpec:
        return ArrowSpec(stacks, k, temperature)

    return attach_stacked(model, adapters, spec, force=force)


def without_general(adapter: Adapter, general: Sequence[Adapter], *, space: str = "delta") -> Adapter:
    """GenKnowSub: an adapter less the mean of general ones. Raises as `mix` does."""
    if not general:
        raise BadParameter("no general adapter was given; expected at least one, whose mean is taken away")
    return mix([adapter, *general], "linear", weights=[1.0, *[-1 / len(general)] * len(general)], space=space)
