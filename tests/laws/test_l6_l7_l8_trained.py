"""L6: the trainable count is the closed form. L7: what is declared trainable moves, all else keeps its bits. L8: rank(ΔW) <= bound."""

import pytest
import torch

from lorakit import list_methods
from lorakit.core.unfreeze import unfreeze
from tests.laws.matrix import under
from tests.laws.steps import Run
from tests.laws.subject import base, everything, provides, same_bits, small, subject

PLACES = (("llama", "all-linear"), ("llama", "embedding"), ("gpt2", ["c_attn[q]", "c_attn[v]", "mlp"]))


def check_L6(name: str) -> None:
    for arch, sites in PLACES:
        adapted = subject(name, arch, sites=sites)
        method = small(name, sites=sites)
        whole = {id(u.original): u.original.numel() for u in unfreeze(base(arch), method.unfreeze)} if method.unfreeze else {}
        beside = sum(spec.count(adapted.model) for spec in method.patches) + sum(whole.values())
        want = method.count([b.site for b in adapted.branches()]) + beside
        require = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
        assert adapted.params().numel() == require == want, (arch, adapted.params().numel(), require, want)


def check_L7(name: str) -> None:
    for sites, whole in (("all-linear", ("lm_head",)), ("embedding", ())):
        adapted = subject(name, awake=False, sites=sites, unfreeze=whole)
        run = Run(adapted, total=8)
        declared = {id(p.tensor) for p in adapted.params()}
        names = {n for n, p in adapted.model.named_parameters() if id(p) in declared}
        assert names
        assert len(names) == len(declared) == len(adapted.params())
        before = everything(adapted.model)
        run.steps(4)
        for branch in adapted.branches():
            branch.expel()  # what a base has absorbed is the adapter's
        after = everything(adapted.model)
        legs = (".A0", ".B0") if "legs" in provides(adapted.methods["default"]) else ()
        for key in [k for k in before if not k.endswith(legs)]:
            assert same_bits(before[key], after[key]) != (key in names), f"{key}: {'did not move' if key in names else 'moved'}"
            assert torch.isfinite(after[key]).all()


@torch.no_grad()
def check_L8(name: str) -> None:
    adapted = subject(name, dtype=torch.float64, awake=False, sites=["q_proj", "down_proj"])
    with torch.enable_grad():
        Run(adapted, total=8).steps(4)
    for branch in adapted.branches():
        full = adapted.methods["default"].combine.full_rank()
        rank = int(torch.linalg.matrix_rank(branch.delta.weight(), rtol=1e-10))
        bound = branch.delta.bound()
        assert min(1, bound) <= rank <= bound < min(branch.site.d_in, branch.site.d_out)
        whole = int(torch.linalg.matrix_rank(branch.weight(), rtol=1e-10))
        assert whole > rank if full else whole == rank


@pytest.mark.parametrize("name", list_methods())
def test_L6(name: str) -> None:
    check_L6(name)


@pytest.mark.parametrize("name", list_methods())
def test_L7(name: str) -> None:
    check_L7(name)


@pytest.mark.parametrize("name", under("L8"))
def test_L8(name: str) -> None:
    check_L8(name)
