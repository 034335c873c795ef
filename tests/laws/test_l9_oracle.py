"""L9: outputs and gradients equal an oracle that forms W + weight() and calls the untouched model on it (fp64)."""

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorakit import Adapted, Method, attach
from lorakit.core.shared import Patch
from lorakit.core.site import ROOT
from tests.laws.matrix import under
from tests.laws.subject import base, batch, dense, far, not_fused, subject

PLACES = (
    ("llama", ["all-linear", "embedding"]),
    ("gpt2", ["c_attn[q]", "c_attn[v]", "mlp"]),
    ("gpt_neox", ["query_key_value[k]", "attention.dense"]),
    ("bert", "all-linear"),
)


def oracle(adapted: Adapted, arch: str, ids: Tensor) -> Tensor:
    """Loss of a fresh model whose weights are W + Σ weight() of the active branches, as a function of the adapter's parameters; weights
    trained whole stand in the place of W, and patches of the model around W are built anew (their own tests check what they do)."""
    fresh = dense(base(arch, torch.float64, tied=True), adapted.methods["default"])
    patches = adapted.methods["default"].patches
    if patches:
        attach(fresh, Method(None, patches=patches, identity=False))
    shared = {f"{ROOT}.default.{child}": part for child, part in adapted.shared("default").items() if isinstance(part, Patch)}
    weights: dict[str, Tensor] = {f"{path}.{k}": p for path, part in shared.items() for k, p in part.named_parameters()}
    weights |= {u.name: u.trained for name in adapted.active for u in adapted.unfrozen[name]}
    for branch in adapted.branches():
        module = fresh.get_submodule(branch.site.module)
        change = branch.weight()
        stored = change.T if isinstance(module, (Conv1D, torch.nn.Embedding)) else change
        key = f"{branch.site.module}.weight"
        weights[key] = weights.get(key, module.weight.detach()) + stored
        if (shift := branch.bias()) is not None:
            module.register_forward_hook(lambda _, x, y, shift=shift: y + shift)
    out = torch.func.functional_call(fresh, weights, (), {"input_ids": ids, "labels": ids}, tie_weights=False)
    return out.loss


def check_L9(name: str) -> None:
    for arch, sites in PLACES:
        adapted = subject(name, arch, dtype=torch.float64, sites=sites, model={"tied": True})
        tensors = [p.tensor for p in adapted.params()]
        names = [p.name for p in adapted.params()]
        unseen = {f"{b.site.name}.b" for b in adapted.branches() if b.bias() is not None and b.site.name.endswith("self.key")}
        ids = batch()
        loss = adapted.model(input_ids=ids, labels=ids).loss
        want = oracle(adapted, arch, ids)
        assert abs(loss.item() - want.item()) < 1e-10, (arch, loss.item(), want.item())
        grads, wanted = torch.autograd.grad(loss, tensors, allow_unused=True), torch.autograd.grad(want, tensors)
        for n, g, w in zip(names, grads, wanted, strict=True):
            assert g is not None, f"{n} has no gradient"
            if n in unseen or (arch == "bert" and n.endswith("self.key.bias")):  # softmax does not see it: its gradient is rounding
                assert max(g.abs().max(), w.abs().max()) < 1e-12
                continue
            assert w.abs().max() > 1e-12
            assert far(g, w) < 1e-8, (arch, n, far(g, w))


@pytest.mark.parametrize("name", under("L9"))
def test_L9(name: str) -> None:
    check_L9(name)


@pytest.mark.parametrize("name", under("L9"))
def test_L9_not_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    not_fused(monkeypatch)
    check_L9(name)
