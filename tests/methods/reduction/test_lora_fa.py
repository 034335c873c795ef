"""LoRA-FA's acceptance properties (arXiv:2308.03303)."""

import pytest
import torch
from torch import Tensor

from lorakit import Adapted, attach, get_method
from lorakit.methods.reduction.lora_fa import corrected
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, far, same_bits, subject
from tests.methods.tools import fit, layer, normal, teacher, whole


def test_only_b_is_trained_and_a_keeps_its_bits() -> None:
    for correct in (False, True):
        adapted = subject("lora_fa", awake=False, correct=correct)
        sites = [b.site for b in adapted.branches()]
        assert adapted.params().numel() == sum(4 * s.d_out for s in sites)
        before = {k: v.clone() for k, v in adapted.tensors("default").items()}
        Run(adapted, total=8).steps(4)
        for key, value in adapted.tensors("default").items():
            assert same_bits(value, before[key]) == key.endswith(".A")


def projection(A: Tensor) -> Tensor:
    """Aᵀ(AAᵀ)⁻¹A: [d_in, d_in]."""
    return A.T @ torch.linalg.solve(A @ A.T, A)


def full_gradient(adapted: Adapted, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B's gradient, the gradient by the whole weight) of a loss at the start."""
    W = whole(adapted)
    loss = (W - target).square().sum()
    (branch,) = adapted.branches()
    (g_B,) = torch.autograd.grad(loss, branch.delta.B, retain_graph=True)
    (g,) = torch.autograd.grad(loss, W)
    return g_B, g


@pytest.mark.parametrize("alpha", [1.0, 4.0, 32.0])
def test_the_corrected_gradient_is_the_full_one_projected_on_the_row_space_of_a(alpha: float) -> None:
    adapted = layer(get_method("lora_fa", r=4, alpha=alpha, correct=True, sites="w"))
    (branch,) = adapted.branches()
    A, s = branch.delta.A.detach(), branch.delta.s
    g_B, g = full_gradient(adapted, normal(10, 12, seed=7))
    assert far(g_B, s * g @ A.T) < 1e-12
    best = s * corrected(g_B, A, s) @ A
    assert far(best, g @ projection(A)) < 1e-6
    for i in range(5):  # and nothing that B can do imitates g better
        other = best + 1e-2 * normal(10, 4, seed=i) @ A
        assert (other - g).norm() > (best - g).norm()
    uncorrected = s * g_B @ A
    assert far(uncorrected, g @ projection(A)) > 1e-2


def test_the_correction_acts_in_a_step_before_clipping_and_survives_a_deficient_a() -> None:
    adapted = layer(get_method("lora_fa", r=4, correct=True, sites="w"))
    (branch,) = adapted.branches()
    target = normal(10, 12, seed=7)
    g_B, _ = full_gradient(adapted, target)
    seen: list[Tensor] = []
    run = Run(adapted, total=2, clip=1e9, data=lambda i: target, loss=lambda model, t: (whole(adapted) - t).square().sum())
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(branch.delta.B.grad.clone()))
    run.step()
    assert far(seen[0], corrected(g_B, branch.delta.A.detach(), branch.delta.s)) < 1e-12
    assert run.optimizer.param_groups[0]["eps"] == 1e-6
    deficient = branch.delta.A.detach().clone()
    deficient[1] = deficient[0]
    assert corrected(g_B, deficient, 2.0).isfinite().all()


def saved_bytes(adapted: Adapted | None, model: torch.nn.Module) -> int:
    """What one forward of the whole model keeps for backward, parameters aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    x = normal(2, 64, 128, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(inputs_embeds=x)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_activations_cost_what_the_frozen_models_do() -> None:
    def model() -> torch.nn.Module:
        return base("llama", hidden_size=128, intermediate_size=256).requires_grad_(False)

    frozen = saved_bytes(None, model())
    costs = {}
    for name in ("lora_fa", "lora"):
        adapted = awaken(attach(model(), get_method(name, r=2)))
        costs[name] = saved_bytes(adapted, adapted.model) / frozen
    assert costs["lora_fa"] <= 1.02
    assert costs["lora"] > 1.1, "so the figure says something"


def test_what_lies_outside_the_row_space_of_a_is_never_learned() -> None:
    target = teacher(10, 12, [2.0, 1.0])
    adapted = layer(get_method("lora_fa", r=4, sites="w"))
    (branch,) = adapted.branches()
    plateau = (target @ (torch.eye(12, dtype=torch.float64) - projection(branch.delta.A.detach()))).square().sum().item()
    assert plateau > 0.1
    assert fit(adapted, target) == pytest.approx(plateau, rel=1e-8)
    change = branch.weight().detach()
    assert far(change @ projection(branch.delta.A.detach()), change) < 1e-10
    assert fit(layer(get_method("lora", r=4, sites="w")), target) < 1e-8


def test_an_embedding_can_learn() -> None:
    adapted = subject("lora_fa", sites="embedding", awake=False)
    Run(adapted, total=8).steps(2)
    (branch,) = adapted.branches()
    assert branch.weight().abs().max() > 0
