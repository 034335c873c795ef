"""L10: every method works over every base: storage, bias, fused rows, embedding lookup, bf16, experts (or it says why it cannot)."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit import Incompatible, Method, list_methods, select
from lorakit.core.layer import Branch
from tests.laws.steps import Run
from tests.laws.subject import attached, awaken, base, batch, far, logits, loss_of, refusal, refuses_merge, same_bits, small, stored
from tests.laws.test_l2_l3_weight import inputs, part_of_output


@dataclass(frozen=True)
class Place:
    """Where to attach, and what the host module must look like there."""

    arch: str
    sites: Any
    host: type
    bias: bool
    dtype: torch.dtype = torch.float32
    fused: bool = False


HALF = torch.bfloat16
BASES = {
    "linear": Place("llama", "all-linear", torch.nn.Linear, False),
    "linear+bias": Place("bert", "all-linear", torch.nn.Linear, True),
    "conv1d": Place("gpt2", "all-linear", Conv1D, True),
    "conv1d rows": Place("gpt2", ["c_attn[q]", "c_attn[v]"], Conv1D, True, fused=True),
    "interleaved rows": Place("gpt_neox", ["query_key_value[q]", "query_key_value[v]"], torch.nn.Linear, True, fused=True),
    "embedding": Place("llama", "embedding", torch.nn.Embedding, False),
    "linear bf16": Place("llama", "all-linear", torch.nn.Linear, False, HALF),
    "conv1d rows bf16": Place("gpt2", ["c_attn[q]", "c_attn[v]", "c_proj"], Conv1D, True, HALF),
    "embedding bf16": Place("llama", "embedding", torch.nn.Embedding, False, HALF),
    "float64": Place("qwen2", "all-linear", torch.nn.Linear, False, torch.float64),
    "experts": Place("mixtral", "experts", torch.nn.Module, False),
    "experts transposed+bias": Place("gpt_oss", "experts", torch.nn.Module, True),
    "router": Place("qwen3_moe", "router", torch.nn.Module, False),
}


def refused(model: nn.Module, method: Method) -> bool:
    """Whether the method says that it cannot adapt these sites, before it touches the model."""
    kinds, sites = [type(m) for m in model.modules()], select(model, method.sites) if method.delta is not None else []
    try:
        method.check_kinds(sites)
        return False
    except Incompatible as error:
        why = str(error)
    assert f"cannot adapt {len(sites)} weights of a mixture ({sites[0].kind}: {sites[0].name}, …)" in why
    assert refusal(Incompatible, lambda: attached(model, method)) == why
    assert [type(m) for m in model.modules()] == kinds
    return True


def check_L10(name: str, label: str) -> None:
    place = BASES[label]
    coarse = place.dtype == HALF
    method = small(name, sites=place.sites, whole=place.sites != "embedding")  # the table itself stays frozen
    model = base(place.arch, place.dtype)
    if refused(model, method):
        return
    start = logits(stored(base(place.arch, place.dtype), method), batch())
    adapted = attached(model, method)
    assert all(p.tensor.dtype == torch.promote_types(place.dtype, torch.float32) for p in adapted.params())  # one trainable dtype
    for branch in adapted.branches():
        assert isinstance(branch.host.module, place.host)
        assert not place.fused or branch.site.rows is not None
    if method.identity:
        assert far(logits(model, batch()), start) < (2e-2 if coarse else 1e-5)
    awaken(adapted)
    with torch.no_grad():
        for branch in adapted.branches() if method.delta is not None and method.delta.linear else ():
            x = inputs(branch, dtype=place.dtype)
            part, y = part_of_output(branch, x, adapted)
            W = branch.weight()
            want = W.T[x] if branch.site.kind == "embedding" else x.to(W.dtype) @ W.mT
            want = want if branch.bias() is None else want + branch.bias()
            assert part.dtype == y.dtype == place.dtype
            scale = torch.maximum(y.abs().max(), want.abs().max())  # an anchored delta is a difference of parts as large as y
            assert (part.to(W.dtype) - want).abs().max() < (3e-2 if coarse else 1e-4) * scale, (
                branch.site.name,
                far(part.to(W.dtype), want),
            )
    live, frozen = logits(model, batch()), {b.site.name: weight(b).clone() for b in adapted.branches()}
    assert live.dtype == place.dtype
    assert not torch.equal(live, start)
    if not refuses_merge(adapted):
        assert far(logits(adapted.merge(), batch()).double(), live.double()) < (0.1 if coarse else 1e-4)
        adapted.unmerge()
    before = {p.name: p.tensor.detach().clone() for p in adapted.params()}
    model.zero_grad()
    loss_of(model, batch()).backward()
    reached = {p.name for p in adapted.params() if p.site is not None or p.tensor.grad is not None}  # BERT has a bias that nothing reads
    model.zero_grad()
    Run(adapted, total=8).steps(2)  # a search takes the two layers in turn
    assert all(torch.isfinite(p.tensor).all() for p in adapted.params())
    assert all(not torch.equal(p.tensor, before[p.name]) for p in adapted.params() if p.name in reached)
    assert all(same_bits(weight(b), frozen[b.site.name]) for b in adapted.branches())


def weight(branch: Branch) -> Tensor:
    """The frozen weight as it is stored."""
    return branch.host.module.get_parameter(branch.site.attribute).detach()


@pytest.mark.parametrize("label", BASES)
@pytest.mark.parametrize("name", list_methods())
def test_L10(name: str, label: str) -> None:
    check_L10(name, label)
