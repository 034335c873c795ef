"""L9: outputs and gradients equal an oracle that forms W + weight() and calls the untouched model on it (fp64)."""

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorakit import Adapted, list_methods
from tests.laws.subject import base, batch, far, subject

PLACES = (
    ("llama", ["all-linear", "embedding"]),
    ("gpt2", ["c_attn[q]", "c_attn[v]", "mlp"]),
    ("gpt_neox", ["query_key_value[k]", "attention.dense"]),
    ("bert", "all-linear"),
)


def oracle(adapted: Adapted, arch: str, ids: Tensor) -> Tensor:
    """Loss of a fresh model whose weights are W + Σ weight() of the active branches, as a function of the adapter's parameters."""
    fresh = base(arch, torch.float64, tied=True)
    weights: dict[str, Tensor] = {}
    for branch in adapted.branches():
        module = fresh.get_submodule(branch.site.module)
        change = branch.weight()
        stored = change.T if isinstance(module, (Conv1D, torch.nn.Embedding)) else change
        key = f"{branch.site.module}.weight"
        weights[key] = weights.get(key, module.weight.detach()) + stored
    out = torch.func.functional_call(fresh, weights, (), {"input_ids": ids, "labels": ids}, tie_weights=False)
    return out.loss


def check_L9(name: str) -> None:
    for arch, sites in PLACES:
        adapted = subject(name, arch, dtype=torch.float64, sites=sites, model={"tied": True})
        tensors = [p.tensor for p in adapted.params()]
        names = [p.name for p in adapted.params()]
        ids = batch()
        loss = adapted.model(input_ids=ids, labels=ids).loss
        want = oracle(adapted, arch, ids)
        assert abs(loss.item() - want.item()) < 1e-10, (arch, loss.item(), want.item())
        grads, wanted = torch.autograd.grad(loss, tensors, allow_unused=True), torch.autograd.grad(want, tensors)
        for n, g, w in zip(names, grads, wanted, strict=True):
            assert g is not None, f"{n} has no gradient"
            assert w.abs().max() > 1e-12
            assert far(g, w) < 1e-8, (arch, n, far(g, w))


@pytest.mark.parametrize("name", list_methods())
def test_L9(name: str) -> None:
    check_L9(name)
