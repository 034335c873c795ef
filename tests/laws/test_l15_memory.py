"""L15: what an adapted layer saves for backward, in elements a token, is at most what is declared (counted by saved_tensors_hooks).

The frozen linear layer saves nothing but its weight. With input x [n, d_in], output y [n, d_out], R = delta.bound(), a branch may save
    plain, A trained    d_in + R          x for A's gradient, z for B's
    plain, A frozen     R                 z only (LoRA-FA)
    combined (γ)        + d_out           the inner sum, for γ's gradient; not fused the frozen output and the delta's
    dropout             + 0               the mask is made again; not fused it is kept (and with γ the dropped x instead of x)
A method outside this form declares its own count in DECLARED.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakit import list_methods
from lorakit.core.layer import Branch
from tests.laws.subject import attached, awaken, base, batch, has_dropout, said, small

TOKENS = 1009  # prime, so that what is saved a token is told from what is not by its size


def kronecker(branch: Branch, dropout: bool) -> int:
    """x (or its copy, turned) and the smaller of the two ways to be halfway through w1 X w2ᵀ."""
    (a1, a2), (b1, b2) = branch.delta.w1.shape, branch.delta.w2.shape
    return branch.site.d_in * (1 + dropout) + min(a1 * b2, a2 * b1)


def module(branch: Branch, dropout: bool) -> int:
    """What the module reads, and r wide: before f, after it, scaled."""
    return branch.delta.width * (1 + dropout) + 3 * branch.delta.r


def hypercomplex(branch: Branch, dropout: bool) -> int:
    """A module's, and in each of both products n² ρ before the rule and after it."""
    n, _, rho = branch.delta.AS.shape
    return module(branch, dropout) + 4 * n * n * rho


def hidden(branch: Branch, dropout: bool) -> int:
    """As LoRA, and the mask of what enters a down projection."""
    return branch.site.d_in * (1 + dropout + (branch.site.role == "down")) + branch.delta.bound()


def mixture(branch: Branch, dropout: bool) -> int:
    """x for the router and, dropped, for the experts with its mask; N gates; N r wide before the gates and after."""
    n, r, _ = branch.delta.A.shape
    return branch.site.d_in * (1 + 2 * dropout) + n + 2 * n * r


DECLARED: dict[str, Callable[[Branch, bool], int]] = {
    "hiddenkey": hidden,
    "fourierft": lambda branch, dropout: branch.site.d_in,  # and never ΔW
    "krona": kronecker,
    **dict.fromkeys(("adapter_houlsby", "adapter_pfeiffer", "mam_parallel"), module),
    "compacter": hypercomplex,
    "loramoe": mixture,
    "xlora": mixture,
    "reslora": lambda branch, dropout: branch.site.d_in * (1 + dropout) + branch.delta.r,  # a first layer: as LoRA
    "vb_lora": lambda branch, dropout: branch.site.d_in * (1 + dropout) + branch.delta.r,  # as LoRA
}


def allowed(name: str, branch: Branch, dropout: bool, fused: bool) -> int:
    """Elements a token."""
    if name in DECLARED:
        return DECLARED[name](branch, dropout and not fused)
    site, trains_A = branch.site, "A" in branch.delta.trains
    outputs = site.d_out * (1 if fused else 2) * bool(branch.combine.trains)
    return site.d_in * trains_A + branch.delta.bound() + outputs + site.d_in * (dropout and not fused)


def saved(module: nn.Module, x: Tensor) -> tuple[float, int]:
    """(elements a token, other elements) of the distinct tensors that forward keeps for backward, its parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t  # alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    sizes = [t.untyped_storage().nbytes() // t.element_size() for t in kept.values()]
    return sum(n for n in sizes if n % TOKENS == 0) / TOKENS, sum(n for n in sizes if n % TOKENS)


def check_L15(name: str) -> None:
    for dropout in (False, True) if has_dropout(name) else (False,):
        model = base("llama", hidden_size=64, intermediate_size=160)
        adapted = awaken(attached(model, small(name, sites=["layers.0.mlp.up_proj", "layers.0.mlp.down_proj"], dropout=0.25 * dropout)))
        model.train()
        for branch in adapted.branches():
            x = torch.randn(TOKENS, branch.site.d_in, requires_grad=True)
            told = said(adapted, branch.host.module, batch(rows=TOKENS, length=1))
            adapted.context.memo.update(told)
            a_token, once = saved(branch.host.module, x)
            fused = branch.host.module.lora.fused(x) is not None
            assert a_token <= allowed(name, branch, dropout, fused), (branch.site.name, dropout, a_token)
            rank = branch.delta.bound() if branch.delta.linear else branch.delta.r
            assert once <= 4 * (branch.site.d_in + branch.site.d_out) * rank, "more than gated or joined factors"


@pytest.mark.parametrize("name", list_methods())
def test_L15(name: str) -> None:
    check_L15(name)
