"""DoRA's acceptance properties (arXiv:2402.09353)."""

import pytest
import torch
from torch import Tensor

from lorakit import Adapted, attach, get_method
from lorakit.core import random
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, logits, same_bits, subject
from tests.methods.tools import fit, layer, normal, whole


@pytest.mark.parametrize("alpha", [4.0, 32.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_the_start_is_the_base_bit_for_bit_whatever_s(arch: str, dtype: torch.dtype, alpha: float) -> None:
    model = base(arch, dtype)
    want = logits(model, batch())
    for training in (False, True):
        adapted = attach(model.train(training), get_method("dora", r=4, alpha=alpha, dropout=0.3))
        assert same_bits(logits(model, batch()), want)
        adapted.detach()


def test_count_is_loras_and_one_a_row() -> None:
    adapted = subject("dora")
    sites = [b.site for b in adapted.branches()]
    want = sum(4 * (s.d_in + s.d_out) + s.d_out for s in sites)
    assert adapted.params().numel() == get_method("dora", r=4).count(sites) == want


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("detach_norm", [True, False])
def test_after_training_every_rows_norm_is_m(detach_norm: bool, arch: str) -> None:
    sites = {"gpt_neox": ["query_key_value[q]", "dense_h_to_4h"]}.get(arch, "all-linear")
    adapted = subject("dora", arch, dtype=torch.float64, awake=False, sites=sites, detach_norm=detach_norm)
    starts = {b.site.name: b.combine.m.detach().clone() for b in adapted.branches()}
    Run(adapted, total=8, lr=5e-2).steps(5)
    moved = 0.0
    for branch in adapted.branches():
        W = branch.base.dense() + (branch.weight() if branch.index is None else branch.weight()[branch.index]).detach()
        torch.testing.assert_close(W.norm(dim=1), branch.combine.m.detach(), rtol=1e-10, atol=0)
        moved = max(moved, far(branch.combine.m.detach(), starts[branch.site.name]))
        V = branch.base.dense() + branch.delta.weight().detach()
        torch.testing.assert_close(W / W.norm(dim=1, keepdim=True), V / V.norm(dim=1, keepdim=True))
    assert moved > 1e-2


def test_m_starts_at_the_norm_of_the_output_rows_in_every_storage() -> None:
    for arch, sites in (("llama", "q_proj"), ("gpt2", "c_fc"), ("llama", "embedding")):
        for branch in subject("dora", arch, awake=False, sites=sites).branches():
            stored = branch.host.module.weight.detach()  # Conv1D and Embedding store W transposed
            want = stored.norm(dim=1 if stored.shape[0] == branch.site.d_out else 0)
            torch.testing.assert_close(branch.combine.m.detach(), want)


def gradient_by_V(detach_norm: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(∂L/∂V, V, ∂L/∂W', m/n) at a random point. With A = I and s = 1, V = W + B, so B's gradient is that by V."""
    adapted = layer(get_method("dora", r=6, alpha=6.0, sites="w", detach_norm=detach_norm), d_in=6, d_out=8)
    (branch,) = adapted.branches()
    with torch.no_grad():
        branch.delta.A.copy_(torch.eye(6))
        branch.delta.B.copy_(normal(8, 6, seed=3))
        branch.combine.m.mul_(1 + 0.3 * normal(8, seed=4).abs())
    W = whole(adapted)
    loss = (W - normal(8, 6, seed=5)).square().sum()
    (g_W,) = torch.autograd.grad(loss, W, retain_graph=True)
    (g_V,) = torch.autograd.grad(loss, branch.delta.B)
    V = branch.base.dense() + branch.delta.B.detach()
    return g_V, V, g_W, branch.combine.m.detach() / V.norm(dim=1)


def test_the_gradient_by_the_direction_is_orthogonal_to_each_row_unless_the_norm_is_detached() -> None:
    g_V, V, g_W, gain = gradient_by_V(detach_norm=False)
    cosines = (g_V * V).sum(1) / (g_V.norm(dim=1) * V.norm(dim=1))
    assert cosines.abs().max() < 1e-12
    v = V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(g_V, gain[:, None] * (g_W - (g_W * v).sum(1, keepdim=True) * v))
    g_V, V, g_W, gain = gradient_by_V(detach_norm=True)
    cosines = (g_V * V).sum(1) / (g_V.norm(dim=1) * V.norm(dim=1))
    assert cosines.abs().max() > 0.1
    torch.testing.assert_close(g_V, gain[:, None] * g_W)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_magnitudes_gradient(detach_norm: bool) -> None:
    adapted = awaken(layer(get_method("dora", r=3, sites="w", detach_norm=detach_norm)))
    (branch,) = adapted.branches()
    W = whole(adapted)
    loss = (W - normal(10, 12, seed=5)).square().sum()
    (g_W,) = torch.autograd.grad(loss, W, retain_graph=True)
    (g_m,) = torch.autograd.grad(loss, branch.combine.m)
    V = (branch.base.dense() + branch.delta.weight()).detach()
    torch.testing.assert_close(g_m, (g_W * V).sum(1) / V.norm(dim=1))


def test_merging_is_undone_exactly() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        adapted = subject("dora", dtype=dtype)
        before = [b.host.module.weight.detach().clone() for b in adapted.branches()]
        live = logits(adapted.model, batch())
        assert far(logits(adapted.merge(), batch()).float(), live.float()) < (1e-5 if dtype == torch.float32 else 0.1)
        adapted.unmerge()
        assert all(same_bits(b.host.module.weight.detach(), w) for b, w in zip(adapted.branches(), before, strict=True))


@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_rescaling_of_rows_is_learned_by_the_magnitude_alone(detach_norm: bool) -> None:
    D = 1 + 0.5 * normal(10, seed=8).abs()
    adapted = layer(get_method("dora", r=1, sites="w", detach_norm=detach_norm))
    (branch,) = adapted.branches()
    W = branch.base.dense().clone()
    optimizer = torch.optim.Adam([p.tensor for p in adapted.params()], lr=0.03)  # a detached norm is no gradient of any function
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        loss = (whole(adapted) - D[:, None] * W).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss.item() < 1e-8
    torch.testing.assert_close(branch.combine.m.detach(), D * W.norm(dim=1), rtol=1e-4, atol=0)
    floor = torch.linalg.svdvals((D[:, None] - 1) * W)[1:].square().sum().item()
    assert floor > 0.1
    assert fit(layer(get_method("lora", r=1, sites="w")), (D[:, None] - 1) * W) == pytest.approx(floor, rel=1e-6), "which LoRA cannot"


def test_the_forward_is_the_papers_with_dropout_on_both_terms_and_the_bias_outside() -> None:
    p = 0.4
    adapted = awaken(layer(get_method("dora", r=3, alpha=7.0, dropout=p, sites="w")))
    (branch,) = adapted.branches()
    adapted.model.train()
    x, host = normal(5, 12, seed=9), adapted.model.w
    with adapted.given(step=2):
        y = host(x)
    dropped = x * random.dropout_mask(x, torch.tensor([0, 2]), random.stream("w"), p)
    W, bias, delta = branch.base.dense(), host.bias.detach(), branch.delta
    n = (W + delta.weight()).norm(dim=1)
    m = branch.combine.m
    want = x @ W.T + bias + (m / n - 1) * (dropped @ W.T) + (m / n) * delta.s * (dropped @ delta.A.T @ delta.B.T)
    torch.testing.assert_close(y, want)
    assert (dropped == 0).any()
    assert bias.abs().min() > 0


def gain(adapted: Adapted) -> Tensor:
    (branch,) = adapted.branches()
    return branch.combine.gain(branch.base, branch.delta)


def test_the_norm_follows_the_factors() -> None:
    adapted = layer(get_method("dora", r=3, sites="w"))
    assert torch.equal(gain(adapted), torch.ones(10, dtype=torch.float64))
    with torch.no_grad():
        adapted.branches()[0].delta.B.normal_()
    (branch,) = adapted.branches()
    torch.testing.assert_close(gain(adapted), branch.combine.m / (branch.base.dense() + branch.delta.weight()).norm(dim=1))


def test_a_row_of_zeros_does_no_harm() -> None:
    adapted = layer(get_method("dora", r=3, sites="w"))
    adapted.detach()
    with torch.no_grad():
        adapted.model.w.weight[2] = 0
    again = attach(adapted.model, get_method("dora", r=3, sites="w"))
    Run(again, total=4, data=lambda i: normal(10, 12, seed=i), loss=lambda m, t: (whole(again) - t).square().sum()).steps(3)
    assert all(p.tensor.isfinite().all() for p in again.params())


def test_dora_on_pissa_takes_the_norm_of_w() -> None:
    made = get_method("dora", r=4).but(delta=get_method("pissa", r=4).delta, init=get_method("pissa", r=4).init)
    model = base()
    want = logits(model, batch())
    adapted = attach(model, made)
    assert far(logits(model, batch()), want) < 1e-5
    for branch in adapted.branches():
        torch.testing.assert_close(branch.combine.m.detach(), branch.base.dense().norm(dim=1))


def test_dora_can_reach_a_full_rank_change() -> None:
    adapted = awaken(layer(get_method("dora", r=2, sites="w")))
    assert (torch.linalg.svdvals(adapted.branches()[0].weight().detach()) > 1e-6).all()
