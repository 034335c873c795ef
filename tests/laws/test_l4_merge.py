"""L4: merge then unmerge is bit-exact, after a hundred merge and switch cycles in bf16 too; merged equals unmerged output.

What is more than a change of weights refuses to merge, with the reason.
"""

import pytest
import torch
from torch import Tensor, nn

from lorakit import list_methods
from tests.laws.subject import awaken, base, batch, calibration, far, logits, refuses_merge, same_bits, small, subject

PLACES = (("llama", ["all-linear", "embedding"]), ("gpt2", "all-linear"), ("gpt_neox", ["query_key_value[q]", "query_key_value[v]", "mlp"]))


def own(host: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """A host's weight and bias as they are: which objects, and copies."""
    return {k: (id(p), p.detach().clone()) for k, p in host.named_parameters(recurse=False)}


def check_L4(name: str) -> None:
    for arch, sites in PLACES:
        adapted = subject(name, arch, sites=sites, model={"tied": True})
        if refuses_merge(adapted):
            continue
        hosts = [b.host.module for b in adapted.branches()]
        before = [own(m) for m in hosts]
        live = logits(adapted.model, batch())
        merged = logits(adapted.merge(), batch())
        assert far(merged, live) < 1e-5, (arch, far(merged, live))
        assert all(any(not torch.equal(own(m)[k][1], w) for k, (_, w) in b.items()) for m, b in zip(hosts, before, strict=True))
        adapted.unmerge()
        assert [{k: i for k, (i, _) in own(m).items()} for m in hosts] == [{k: i for k, (i, _) in b.items()} for b in before]
        assert all(same_bits(own(m)[k][1], w) for m, b in zip(hosts, before, strict=True) for k, (_, w) in b.items())
        assert same_bits(logits(adapted.model, batch()), live)


def check_L4_cycles(name: str, *, cycles: int = 100) -> None:
    """bf16, two adapters in turn, on hosts with biases; and the merge itself is W + ΔW rounded once."""
    adapted = subject(name, "qwen2", dtype=torch.bfloat16, sites="q_proj")
    awaken(adapted.add("other", small(name, sites=["q_proj", "v_proj"]), seed=5, calibration=calibration(4)), seed=2)
    hosts = {id(m): m for m in (s.base.module for s in adapted._all_slots())}
    before = {i: own(m) for i, m in hosts.items()}
    for i in range(cycles):
        adapted.switch(("default", "other")[i % 2])
        if refuses_merge(adapted):
            continue
        once = [b.host.dense(torch.float32) + b.weight().detach() for b in adapted.branches()] if i < 2 else []
        shifts = [(b, before[id(b.host.module)]["bias"][1].float() + b.bias().detach()) for b in adapted.branches() if b.bias() is not None]
        adapted.merge()
        assert all(torch.equal(b.host.dense(), w.to(torch.bfloat16)) for b, w in zip(adapted.branches(), once, strict=False))
        assert all(torch.equal(b.host.bias, bias.to(torch.bfloat16)) for b, bias in shifts)
        adapted.unmerge()
    assert all(same_bits(own(m)[k][1], w) for i, m in hosts.items() for k, (_, w) in before[i].items())
    want = base("qwen2", torch.bfloat16)
    assert same_bits(logits(adapted.detach(), batch()), logits(want, batch()))


@pytest.mark.parametrize("name", list_methods())
def test_L4(name: str) -> None:
    check_L4(name)


@pytest.mark.parametrize("name", list_methods())
def test_L4_hundred_cycles(name: str) -> None:
    check_L4_cycles(name)
