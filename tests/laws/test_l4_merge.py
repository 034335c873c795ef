"""L4: merge then unmerge is bit-exact, after a hundred merge and switch cycles in bf16 too; merged equals unmerged output."""

import pytest
import torch

from lorakit import list_methods
from tests.laws.subject import awaken, base, batch, far, logits, same_bits, small, subject

PLACES = (("llama", ["all-linear", "embedding"]), ("gpt2", "all-linear"), ("gpt_neox", ["query_key_value[q]", "query_key_value[v]", "mlp"]))


def check_L4(name: str) -> None:
    for arch, sites in PLACES:
        adapted = subject(name, arch, sites=sites, model={"tied": True})
        hosts = [b.host.module for b in adapted.branches()]
        before = [(id(m.weight), m.weight.detach().clone()) for m in hosts]
        live = logits(adapted.model, batch())
        merged = logits(adapted.merge(), batch())
        assert far(merged, live) < 1e-5, (arch, far(merged, live))
        assert all(not torch.equal(m.weight, w) for m, (_, w) in zip(hosts, before, strict=True))
        adapted.unmerge()
        assert [id(m.weight) for m in hosts] == [i for i, _ in before]
        assert all(same_bits(m.weight.detach(), w) for m, (_, w) in zip(hosts, before, strict=True))
        assert same_bits(logits(adapted.model, batch()), live)


def check_L4_cycles(name: str, *, cycles: int = 100) -> None:
    """bf16, two adapters in turn; and the merge itself is W + ΔW rounded once."""
    adapted = subject(name, dtype=torch.bfloat16, sites="q_proj")
    awaken(adapted.add("other", small(name, sites=["q_proj", "v_proj"]), seed=5), seed=2)
    hosts = {id(m): m for m in (s.base.module for s in adapted._all_slots())}
    before = {i: m.weight.detach().clone() for i, m in hosts.items()}
    for i in range(cycles):
        adapted.switch(("default", "other")[i % 2])
        once = [before[id(b.host.module)].float() + b.weight().detach() for b in adapted.branches()] if i < 2 else []
        adapted.merge()
        assert all(torch.equal(b.host.dense(), w.to(torch.bfloat16)) for b, w in zip(adapted.branches(), once, strict=False))
        adapted.unmerge()
    assert all(same_bits(m.weight.detach(), before[i]) for i, m in hosts.items())
    want = base("llama", torch.bfloat16)
    assert same_bits(logits(adapted.detach(), batch()), logits(want, batch()))


@pytest.mark.parametrize("name", list_methods())
def test_L4(name: str) -> None:
    check_L4(name)


@pytest.mark.parametrize("name", list_methods())
def test_L4_hundred_cycles(name: str) -> None:
    check_L4_cycles(name)
