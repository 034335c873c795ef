"""L2: a branch's part of the output equals x·weight()ᵀ plus its bias, if any. L3: weight() equals s·B·A of factors(), with the gain."""

import pytest
import torch
from torch import Tensor

from lorakit import Adapted
from lorakit.core.layer import Branch
from tests.laws.matrix import under
from tests.laws.subject import far, subject

PLACES = (("llama", "all-linear"), ("bert", "attention"), ("gpt2", ["c_attn[q]", "c_attn[v]", "c_fc"]), ("llama", "embedding"))


def inputs(branch: Branch, *, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    """Random input of one site: [3, 5, d_in], every id once at an embedding, rows for each expert [E, 5, d_in] at a stack."""
    gen = torch.Generator().manual_seed(seed)
    if branch.site.kind == "embedding":
        return torch.randperm(branch.site.d_in, generator=gen)[None]
    return torch.randn(branch.site.experts or 3, 5, branch.site.d_in, generator=gen, dtype=torch.float64).to(dtype)


def part_of_output(branch: Branch, x: Tensor, adapted: Adapted) -> tuple[Tensor, Tensor]:
    """(what the branch adds, the frozen output) of the whole module."""
    y = branch.host.matmul(x)
    y = y if branch.host.bias is None else y + branch.host.bias.unsqueeze(-2)  # a row for each expert of a stack
    return branch(x, y, adapted.context), y


@torch.no_grad()
def check_L2(name: str) -> None:
    for arch, sites in PLACES:
        adapted = subject(name, arch, dtype=torch.float64, sites=sites)
        for w in (1.0, -0.5):
            for branch in adapted.branches():  # not adapted.scale, which refuses where modules are trained whole
                branch.w = w
            for branch in adapted.branches():
                x = inputs(branch)
                part, y = part_of_output(branch, x, adapted)
                W = branch.weight()
                want = W.T[x] if branch.site.kind == "embedding" else x @ W.T
                want = want if branch.bias() is None else want + branch.bias()
                assert want.abs().max() > 1e-3
                assert far(part, want) < 1e-9, (arch, branch.site.name, w, far(part, want))
                with torch.enable_grad():
                    whole = branch.host.module.lora.fused(x)
                assert whole is None or far(whole, y + want) < 1e-9, (arch, branch.site.name, w, far(whole, y + want))


@torch.no_grad()
def check_L3(name: str) -> None:
    for arch, sites in PLACES:
        adapted = subject(name, arch, dtype=torch.float64, sites=sites)
        for branch in adapted.branches():
            f, W = branch.factors(), branch.base.dense()
            if f is None:
                continue
            change = f.s * f.B @ f.A
            want = change if f.gain is None else f.gain[:, None] * (W + change) - W
            got = branch.weight() if branch.index is None else branch.weight()[branch.index]
            assert got.shape == (branch.site.d_out, branch.site.d_in)
            assert far(got, want) < 1e-9, (arch, branch.site.name, far(got, want))


@pytest.mark.parametrize("name", under("L2"))
def test_L2(name: str) -> None:
    check_L2(name)


@pytest.mark.parametrize("name", under("L3"))
def test_L3(name: str) -> None:
    check_L3(name)
