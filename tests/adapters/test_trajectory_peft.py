"""Acceptance: 50 training steps in fp64 from the same tensors follow the real PEFT's, loss by loss and tensor by tensor.

GPT-NeoX (Linear) and GPT-2 (Conv1D): their norms compute in fp64, where Llama's round to fp32 inside.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit
from lorakit.core.attach import Adapted
from lorakit.core.events import Step
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.method import Method
from tests.adapters.subject import quiet, tiny_model
from tests.laws.steps import idle

STEPS = 50
TOLERANCE = 1e-9
TARGETS = {"gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
ENDS = {"A": ("lora_A.default.weight", "lora_A.default"), "B": ("lora_B.default.weight", "lora_B.default"), "g": ("lora_E.default",)}
SHARED = {"r": 4, "lora_alpha": 8}
SCHEDULE: dict[str, Any] = {"target_r": 2, "tinit": 5, "tfinal": 10, "beta1": 0.85, "beta2": 0.85}


@dataclass(frozen=True)
class Case:
    """A method by both names."""

    name: str
    ours: dict[str, Any]
    theirs: Callable[..., Any]


CASES = [
    Case("lora", {"r": 4, "alpha": 8.0}, lambda **k: peft.LoraConfig(**SHARED, **k)),
    Case("rslora", {"r": 4, "alpha": 8.0}, lambda **k: peft.LoraConfig(**SHARED, use_rslora=True, **k)),
    Case("dora", {"r": 4, "alpha": 8.0}, lambda **k: peft.LoraConfig(**SHARED, use_dora=True, **k)),
    Case("pissa", {"r": 4, "alpha": 8.0}, lambda **k: peft.LoraConfig(**SHARED, **k)),
    Case(
        "adalora",
        {"r": 4, "alpha": 8.0, "delta_t": 2, "orth": 0.3, **SCHEDULE},
        # without a task type PEFT calls the base model past AdaLoRA's forward, and there is no penalty
        lambda **k: peft.AdaLoraConfig(
            init_r=4, lora_alpha=8, total_step=STEPS, deltaT=2, orth_reg_weight=0.3, task_type="CAUSAL_LM", **SCHEDULE, **k
        ),
    ),
]


def batches() -> list[Tensor]:
    """Five batches, over and over: something to learn by heart."""
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(0, 128, (2, 16), generator=rng) for _ in range(5)] * (STEPS // 5)


def base(arch: str) -> nn.Module:
    model = tiny_model(arch).double()

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:  # Transformers' own rounds the logits to fp32
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.loss_function = loss
    return model


def train_ours(adapted: Adapted, method: Method, *, late: int = 0) -> list[float]:
    """`late` shifts the step that controllers are told: a mutant."""
    optimizer = torch.optim.AdamW([p.tensor for p in adapted.params()], lr=1e-2, weight_decay=0.01)
    controllers = [spec.build(idle(adapted, STEPS)) for spec in method.controllers]
    losses = []
    for i, ids in enumerate(batches()):
        loss = adapted.model(input_ids=ids, labels=ids).loss
        loss = loss + sum(penalty(adapted, adapted.context) for penalty in method.penalties)
        loss.backward()
        optimizer.step()
        for controller in controllers:
            controller.after_step(Step(i + late, STEPS))
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_theirs(model: Any) -> list[float]:
    trained = [p for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    losses = []
    for i, ids in enumerate(batches()):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if model.peft_type == "ADALORA":
            model.base_model.update_and_allocate(i)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def counterparts(adapted: Adapted, model: Any) -> list[tuple[str, Tensor, Tensor]]:
    """(name, ours, PEFT's) of every trained tensor, in PEFT's shape."""
    theirs = dict(model.named_parameters())
    out = []
    for row in adapted.params():
        module, short = row.name.rsplit(".", 1)
        ends = {**ENDS, "m": ("lora_magnitude_vector.default.weight",)}[short]
        found = next(theirs[n] for n in (f"base_model.model.{module}.{end}" for end in ends) if n in theirs)
        out.append((row.name, row.tensor.view(found.shape), found))
    assert len(out) == sum(p.requires_grad for p in theirs.values())
    return out


def same_start(adapted: Adapted, model: Any) -> None:
    """PEFT's tensors from ours; for PiSSA also the residual W − s·B₀A₀, which PEFT itself makes in fp32 at best."""
    with torch.no_grad():
        for _, ours, theirs in counterparts(adapted, model):
            theirs.copy_(ours)
        for branch in adapted.branches():
            if "anchor" in branch.delta.provides:
                layer = model.get_submodule(f"base_model.model.{branch.site.name}").get_base_layer()
                residual = branch.base.dense() - branch.delta.s * branch.delta.B0 @ branch.delta.A0
                layer.weight.copy_(residual if layer.weight.shape == residual.shape and not is_conv1d(layer) else residual.T)


def is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"


def apart(arch: str, case: Case, *, change: Callable[[Method], Method] = lambda m: m, late: int = 0) -> tuple[float, float]:
    """The largest difference of losses and of trained tensors."""
    model = base(arch)
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), case.theirs(target_modules=TARGETS[arch])).train()
    for name, p in theirs.named_parameters():
        if "ranknum" in name:  # PEFT 0.21 unfreezes its copy of the initial rank on a base that is not fp32, trains it, and never saves it
            p.requires_grad_(False)
    method = change(lorakit.get_method(case.name, **case.ours))
    adapted = lorakit.attach(model.train(), method)
    same_start(adapted, theirs)
    dtypes = {t.dtype for _, a, b in counterparts(adapted, theirs) for t in (a, b)}
    assert dtypes == {torch.float64}
    losses, reference = train_ours(adapted, method, late=late), train_theirs(theirs)
    assert reference[-1] < reference[0] - 0.1  # it did train
    tensors = max((a - b).abs().max().item() for _, a, b in counterparts(adapted, theirs))
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True)), tensors


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_trajectory_as_peft(arch, case):
    losses, tensors = apart(arch, case)
    assert losses <= TOLERANCE
    assert tensors <= TOLERANCE


def scaled(method: Method) -> Method:
    """A scale that is wrong in the sixth digit."""
    assert isinstance(method.delta, LowRankSpec)
    return method.but(delta=replace(method.delta, rank=replace(method.delta.rank, alpha=method.delta.rank.alpha * (1 + 1e-6))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_scale_wrong_in_the_sixth_digit_is_seen(case):
    losses, tensors = apart("gpt_neox", case, change=scaled)
    assert min(losses, tensors) > TOLERANCE


@pytest.mark.parametrize(
    "mutant",
    [{"late": 1}, {"change": lambda m: m.but(penalties=())}, {"change": lambda m: m.but(controllers=())}],
    ids=["a step late", "no penalty", "no pruning"],
)
def test_mutants_of_adalora_are_seen(mutant):
    losses, tensors = apart("gpt_neox", CASES[-1], **mutant)
    assert min(losses, tensors) > TOLERANCE


def test_adalora_prunes_to_its_budget_on_the_way():
    """Else the agreement above would say nothing about pruning."""
    model = base("gpt_neox")
    method = lorakit.get_method("adalora", **CASES[-1].ours)
    adapted = lorakit.attach(model.train(), method)
    train_ours(adapted, method)
    gates = torch.cat([b.delta.g for b in adapted.branches()])
    assert int((gates != 0).sum()) == 2 * len(adapted.branches())
