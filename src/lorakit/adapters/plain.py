"""Factors as an ordinary LoRA: what an adapter that is put together from others, or taken out of one, is kept as."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorakit.adapters.peft_rank import expressed
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.method import get_method
from lorakit.core.site import Site


def plain_lora(sites: Sequence[Site], factors: Mapping[str, Factors], meta: Mapping[str, Any], *, dropout: float = 0.0) -> Adapter:
    """The adapter `lora` with these A, B and s, by site name. Its recipe says every rank and scale."""
    rank = expressed({name: (f.A.shape[-2], f.s) for name, f in factors.items()})
    patterns: dict[str, dict[str, Any]] = {
        "rank_pattern": dict(rank.rank_pattern),
        "alpha_pattern": {name: _alpha(alpha) for name, alpha in rank.alpha_pattern},
    }
    recipe = get_method(
        "lora",
        r=rank.r,
        alpha=_alpha(rank.alpha),
        dropout=dropout,
        sites=tuple(f"re:{re.escape(site.name)}" for site in sites),
        **{name: pattern for name, pattern in patterns.items() if pattern},
    ).recipe
    assert recipe is not None
    pairs = ((site.name, factors[site.name]) for site in sites)
    tensors = {f"{name}.{k}": v.detach().contiguous() for name, f in pairs for k, v in (("A", f.A), ("B", f.B))}
    return Adapter(recipe, tuple(sites), tensors, dict(meta))


def _alpha(value: float) -> float:
    """A scale that was kept in fp32 has seven digits: the number that was meant."""
    meant = float(f"{value:.6g}")
    return meant if float(torch.tensor(meant)) == float(torch.tensor(value)) else value
