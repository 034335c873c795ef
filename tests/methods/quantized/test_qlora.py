"""QLoRA's acceptance properties (arXiv:2305.14314). Bits, layout, bits a parameter, odd shapes: tests/parts/bases."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, Method, attach, get_method, load, quantize
from lorakit.core.base import base_of, expand
from lorakit.core.site import Site
from lorakit.data.tiny import tiny_model
from lorakit.methods.learning.dora import Decomposed, DecomposedSpec
from lorakit.parts.bases import host
from lorakit.parts.bases.nf4_base import NF4, NF4Spec
from tests.adapters import test_trajectory_peft as trajectory
from tests.adapters.subject import quiet
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, logits, loss_of, not_fused, same_bits, small, subject
from tests.methods.tools import layer, minimize, normal
from tests.parts.bases.oracle import bitsandbytes


def packed(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(type(m), "storage", None) is NF4]


def plain(arch: str, dtype: torch.dtype = torch.float64, **sizes: int) -> nn.Module:
    """The model of decoded weights."""
    return expand(quantize(base(arch, dtype, **sizes)))


def test_its_defaults_are_the_official_ones() -> None:
    method = get_method("qlora")
    assert method.base == NF4Spec(double_quant=True, blocksize=64, sites="all-linear")
    assert method.delta.rank.named("any") == (64, 0.25)
    assert method.delta.dropout == 0
    assert method.delta == get_method("lora", r=64, alpha=16.0).delta


def test_the_start_is_the_quantized_model_s_and_every_linear_layer_is_packed_whatever_is_adapted() -> None:
    for sites in ("all-linear", "qv", "embedding"):
        model = base("llama")
        adapted = attach(model, get_method("qlora", r=4, sites=sites))
        assert len(packed(model)) == 14
        assert same_bits(logits(model, batch()), logits(quantize(base("llama")), batch()))
        assert far(logits(model, batch()), logits(base("llama"), batch())) > 1e-2
        assert same_bits(logits(adapted.detach(), batch()), logits(base("llama"), batch()))


def check_gradients(arch: str = "llama", **sizes: int) -> None:
    """Those of LoRA on the decoded weights, exactly; the codes have none."""
    ours = awaken(attach(base(arch, torch.float64, **sizes), get_method("qlora", r=4, alpha=8.0)))
    theirs = awaken(attach(plain(arch, **sizes), get_method("lora", r=4, alpha=8.0)))
    for adapted in (ours, theirs):
        loss_of(adapted.model.train(), batch()).backward()
    for a, b in zip(ours.params(), theirs.params(), strict=True):
        assert far(a.tensor.grad, b.tensor.grad) < 1e-10, a.name
    assert all(m.weight.grad is None for m in packed(ours.model))


@pytest.mark.parametrize(("arch", "sizes"), [("llama", {}), ("gpt2", {}), ("llama", {"hidden_size": 48, "intermediate_size": 80})])
def test_gradients_go_through_the_decoded_weight(arch: str, sizes: dict[str, int]) -> None:
    """The last case: rows that are no whole blocks."""
    check_gradients(arch, **sizes)


def test_a_gradient_that_stops_at_the_base_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = host.product
    for fused in (True, False):
        with monkeypatch.context() as m:
            if fused:
                m.setattr(NF4, "bound", lambda self: lambda dy, dx: dy.new_zeros(len(dy), self.shape[1]) if dx is None else dx)
            else:
                not_fused(m)
                m.setattr(host, "product", lambda module, packed, x, **how: real(module, packed, x.detach(), **how) + 0 * x.sum())
            with pytest.raises(AssertionError):
                check_gradients()


def saved_bytes(adapted: Adapted) -> int:
    """What a forward of the whole model keeps for backward, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*adapted.model.parameters(), *adapted.model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of(adapted.model.train(), batch())
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def check_saved() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256}
    ours = attach(base("llama", **sizes), get_method("qlora", r=4))
    theirs = attach(base("llama", **sizes), get_method("lora", r=4))
    assert saved_bytes(ours) <= saved_bytes(theirs)


def test_forward_keeps_no_more_than_lora_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, nothing dense: a dense W̃ kept at each layer is seen."""
    check_saved()
    not_fused(monkeypatch)
    check_saved()
    monkeypatch.setattr(host, "product", lambda module, packed, x, **how: x @ host.decoded(module, packed).T)
    with pytest.raises(AssertionError):
        check_saved()


def check_modes() -> None:
    """A look at the model in eval mode changes nothing that training sees or saving writes."""
    grads: list[list[Tensor]] = []
    for looks in (False, True):
        adapted = awaken(attach(quantize(base("llama")), get_method("lora", r=4)))
        before = {k: v.clone() for k, v in adapted.model.state_dict().items()}
        if looks:
            for training in (False, True, False):
                logits(adapted.model.train(training), batch())
        loss_of(adapted.model.train(), batch()).backward()
        grads.append([p.tensor.grad for p in adapted.params()])
        assert all(g is not None for g in grads[-1])
        assert all(same_bits(v, before[k]) for k, v in adapted.model.state_dict().items())
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_train_eval_train_equals_train() -> None:
    check_modes()


def test_a_base_that_repacks_itself_in_eval_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes 0.50.2 does on some CPUs: from the first look on, the scales are bf16."""
    real = host.product

    def repacking(module: nn.Module, packed: host.Packed, x: Tensor, **how: bool) -> Tensor:
        if not module.training:
            host.put(module, packed._replace(nested=packed.nested.bfloat16().float()))
        return real(module, packed, x, **how)

    monkeypatch.setattr(host, "product", repacking)
    with pytest.raises(AssertionError):
        check_modes()


# --- where it wins, and where it must lose ------------------------------------------------------------------------------------


def on_one_layer(method: Method) -> tuple[Adapted, Tensor, Tensor]:
    """(adapted, W, W̃) of one linear layer of 32 × 64; the codes are its only storage."""
    model = layer(get_method("lora", r=1, sites="w"), d_in=64, d_out=32).detach()
    W = model.w.weight.detach().clone()
    if method.base is not None:
        method = method.but(base=NF4Spec(sites="w"))
    adapted = attach(model, method)
    return adapted, W, base_of(model.w).dense()


def fit_to(adapted: Adapted, target: Tensor) -> float:
    """The least ‖W̃ + ΔW − target‖²_F that training finds."""
    host_, bias = adapted.model.w, adapted.model.w.bias.detach()
    eye = torch.eye(64, dtype=torch.float64)
    return minimize(adapted, lambda: ((host_(eye) - bias).T - target).square().sum())


def test_where_the_base_itself_is_wanted_the_grid_costs_what_rank_r_cannot_mend() -> None:
    """LoRA has it at the start; QLoRA is left with Σ_{i>r} σ_i²(W − W̃), whatever its training."""
    adapted, W, W_ = on_one_layer(get_method("qlora", r=4, sites="w"))
    floor = torch.linalg.svdvals(W - W_)[4:].square().sum().item()
    assert floor > 1
    assert fit_to(adapted, W) == pytest.approx(floor, rel=1e-5)
    lora, W, _ = on_one_layer(get_method("lora", r=2, sites="w"))
    assert fit_to(lora, W) < 1e-12


def test_on_a_base_that_lies_on_the_grid_it_is_lora_at_an_eighth_of_the_bytes() -> None:
    _, _, W_ = on_one_layer(get_method("qlora", r=2, sites="w"))
    target = normal(32, 2, seed=5) @ normal(2, 64, seed=6)
    found = {}
    for name in ("qlora", "lora"):
        method = get_method(name, r=2, sites="w")
        model = nn.ModuleDict({"w": nn.Linear(64, 32).double()})
        with torch.no_grad():
            model.w.weight.copy_(W_)
        adapted = attach(model, method.but(base=NF4Spec(double_quant=False, sites="w")) if method.base else method)
        stored = base_of(model.w).dense()
        assert far(stored, W_) < 1e-6
        found[name] = fit_to(adapted, stored + target)
    assert max(found.values()) < 1e-10


# --- beside PEFT --------------------------------------------------------------------------------------------------------------


def apart(arch: str, method: Method) -> tuple[float, float]:
    """The largest difference of losses and tensors in 50 fp64 steps from PEFT's LoRA on the decoded weights."""
    dense = expand(quantize(trajectory.base(arch)))
    with quiet():
        theirs = peft.get_peft_model(dense, peft.LoraConfig(r=4, lora_alpha=8, target_modules=trajectory.TARGETS[arch])).train()
    adapted = attach(trajectory.base(arch).train(), method)
    trajectory.same_start(adapted, theirs)
    losses, reference = trajectory.train_ours(adapted, method), trajectory.train_theirs(theirs)
    assert reference[-1] < reference[0] - 0.1
    tensors = max((a - b).abs().max().item() for _, a, b in trajectory.counterparts(adapted, theirs))
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True)), tensors


@pytest.mark.parametrize("arch", trajectory.TARGETS)
def test_the_same_trajectory_as_peft_s_lora_on_the_decoded_weights(arch: str) -> None:
    assert max(apart(arch, get_method("qlora", r=4, alpha=8.0))) <= trajectory.TOLERANCE


@pytest.mark.parametrize("wrong", [{"double_quant": False}, {"blocksize": 128}, {"alpha": 8.0 * (1 + 1e-6)}])
def test_a_trajectory_on_another_grid_is_seen(wrong: dict[str, float]) -> None:
    assert min(apart("gpt_neox", get_method("qlora", **{"r": 4, "alpha": 8.0} | wrong))) > trajectory.TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_the_same_training_as_peft_s_on_bitsandbytes_linear4bit(tmp_path: Path) -> None:
    """fp32, in train mode throughout, rows of whole blocks: where bitsandbytes is right on every CPU."""
    from transformers import AutoModelForCausalLM

    bitsandbytes()
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    ours = attach(quantize(tiny_model("llama", **sizes)), get_method("lora", r=4, alpha=8.0))
    ours.model.save_pretrained(tmp_path)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path).train(), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                site, factor = name.removeprefix("base_model.model.").split(".lora_")
                p.copy_(ours.tensors("default")[f"{site}.{factor[0]}"])
    losses: list[list[float]] = []
    for model in (ours.model.train(), theirs.train()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for i in range(15):
            loss = loss_of(model, batch(i % 3))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


# --- with other methods -------------------------------------------------------------------------------------------------------


def check_dora_start(dtype: torch.dtype) -> None:
    model = quantize(base("llama", dtype))
    want = logits(model, batch())
    adapted = attach(model, get_method("dora", r=4, alpha=32.0))
    assert same_bits(logits(model, batch()), want)
    for branch in adapted.branches():
        W = branch.base.dense(torch.float32)
        torch.testing.assert_close(branch.combine.m.detach(), W.norm(dim=1))
        assert branch.combine.m.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qdora_starts_at_the_norms_of_the_decoded_weight(dtype: torch.dtype) -> None:
    check_dora_start(dtype)


def test_norms_of_the_original_weight_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    originals = base("llama")
    build = DecomposedSpec.build

    def wrong(self: DecomposedSpec, site: Site, *rest: Any) -> Decomposed:
        combine = build(self, site, *rest)
        with torch.no_grad():
            combine.m.copy_(originals.get_submodule(site.module).weight.norm(dim=1))
        return combine

    monkeypatch.setattr(DecomposedSpec, "build", wrong)
    with pytest.raises(AssertionError):
        check_dora_start(torch.float32)


def test_qdora_reloads_on_a_base_quantized_again_and_merges_into_a_dense_one(tmp_path: Path) -> None:
    adapted = attach(quantize(base("llama")), get_method("dora", r=4))
    Run(adapted, total=8, lr=3e-2).steps(4)
    adapted.model.eval()
    want = logits(adapted.model, batch())
    adapted.save(tmp_path)
    again = load(quantize(base("llama")), tmp_path)
    assert same_bits(logits(again.model.eval(), batch()), want)
    for branch in again.branches():  # ‖W'_row‖ = m, of W̃
        W = branch.base.dense() + branch.weight().detach()
        torch.testing.assert_close(W.norm(dim=1), branch.combine.m.detach())
    torch.testing.assert_close(logits(again.merge(), batch()), want, rtol=1e-4, atol=1e-5)
    again.unmerge()
    assert same_bits(logits(again.model, batch()), want)


def test_adalora_spends_its_budget_on_nf4_as_on_the_decoded_weights() -> None:
    spent: list[dict[str, Tensor]] = []
    schedule = {"r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "delta_t": 1}
    for model in (quantize(base("llama", torch.float64)), plain("llama")):
        adapted = attach(model, get_method("adalora", **schedule))
        Run(adapted, total=8).steps(8)
        spent.append(adapted.tensors("default"))
    assert all(far(spent[0][k], v) < 1e-8 or not v.any() for k, v in spent[1].items())
    gates = torch.cat([v for k, v in spent[0].items() if k.endswith(".g")])
    assert int((gates != 0).sum()) == 2 * 14


def test_a_start_from_principal_components_takes_those_of_the_decoded_weight() -> None:
    adapted = attach(quantize(base("llama", torch.float64)), get_method("pissa", r=4, alpha=4.0))
    for branch in adapted.branches():
        S = torch.linalg.svdvals(branch.base.dense())
        torch.testing.assert_close(torch.linalg.svdvals((branch.delta.B @ branch.delta.A).detach())[:4], S[:4])


def test_the_adapter_is_a_plain_lora_pair() -> None:
    tensors = subject("qlora", awake=False).state().tensors
    assert {k.rsplit(".", 1)[1] for k in tensors} == {"A", "B"}
    assert all(t.dtype == torch.float32 for t in tensors.values())


@pytest.mark.parametrize("other", ["dora", "adalora", "pissa", "lora_fa"])
def test_composed_with_another_method_it_is_that_method_on_a_quantized_base(other: str) -> None:
    ends = []
    for model, name in ((base("llama"), f"{other}+qlora"), (quantize(base("llama")), other)):
        adapted = attach(model, small(name))
        assert len(packed(model)) == 14
        Run(adapted, total=8).steps(3)
        ends.append(adapted.tensors("default"))
    assert ends[0].keys() == ends[1].keys()
    assert all(same_bits(ends[0][k], v) for k, v in ends[1].items())
