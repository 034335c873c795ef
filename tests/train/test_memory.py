"""The estimate against real steps, real hooks, closed forms, and (slow) fresh processes."""

import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.core.attach import attach
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.method import get_method
from lorakit.data.tiny import ARCHITECTURES, tiny_model
from lorakit.train.memory import (
    OPTIMIZERS,
    MemoryEstimate,
    estimate,
    gradient_bytes,
    measure,
    optimizer_bytes,
    parse_bytes,
    resident_bytes,
    saved_bytes,
    storage_bytes,
    weight_bytes,
)
from lorakit.train.metrics import forward_loss

F32 = 4
CASES = [*((arch, "causal-lm") for arch in ARCHITECTURES), ("bert", "masked-lm"), ("roberta", "sequence-classification")]


def batch_for(task: str, *, size: int = 4, length: int = 16) -> dict[str, Tensor]:
    ids = torch.arange(3, 3 + size * length).view(size, length) % 100 + 3
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    labels = torch.arange(size) % 3 if task == "sequence-classification" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_llama(r: int = 4, sites: Any = "all-linear", **method: Any) -> nn.Module:
    return attach(tiny_model("llama"), get_method("lora", r=r, sites=sites, **method)).model


class MLP(nn.Module):
    def __init__(self, d: int, h: int, k: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def total(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).sum()


# ------------------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize(("b", "d", "h", "k"), [(64, 8, 16, 4), (33, 5, 7, 3)])
def test_mlp_matches_its_closed_form(b: int, d: int, h: int, k: int) -> None:
    model, batch = MLP(d, h, k), {"x": torch.randn(b, d)}
    values = d * h + h + h * k + k
    rows = estimate(model, batch, optimizer="adamw", loss=total)
    assert rows.weights == rows.gradients == F32 * values
    assert rows.optimizer == 2 * F32 * values + 4 * F32  # two moments, and one step count for each of four parameters
    assert saved_bytes(model, batch, loss=total) == F32 * b * h  # relu's output, which the second layer saves again
    # backward of relu: its saved output, the gradient that arrives and the one that leaves; the loss and its gradient, 1
    assert rows.activations == F32 * (3 * b * h + 2)


def test_a_frozen_first_layer_saves_nothing_less_a_frozen_second_saves_no_input() -> None:
    b, d, h, k = 64, 8, 16, 4
    model, batch = MLP(d, h, k), {"x": torch.randn(b, d)}
    model.up.requires_grad_(False)
    assert saved_bytes(model, batch, loss=total) == F32 * b * h  # the second layer's input
    model.requires_grad_(True)
    model.down.requires_grad_(False)
    assert saved_bytes(model, batch, loss=total) == F32 * b * h  # relu's own output


def test_llama2_7b_in_bfloat16() -> None:
    model = llama2_7b()
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    parameters = storage_bytes(model.parameters())
    assert parameters == gradient_bytes(model.parameters()) == 2 * 6_738_415_616
    assert weight_bytes(model) - parameters == storage_bytes(model.buffers()) == 2 * 64 * 2  # the rotary frequencies, twice
    rows = MemoryEstimate(weight_bytes(model), 0, gradient_bytes(model.parameters()), optimizer_bytes(model.parameters(), "adamw"))
    assert round(rows.weights / 1e9, 2) == 13.48
    assert round(rows.weights / 2**30, 2) == 12.55
    assert round(rows.total / 1e9, 1) == 53.9


def test_llama2_7b_with_lora_128_on_everything() -> None:
    model, r = llama2_7b().requires_grad_(False), 128
    for module in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]:
        rows, columns = module.weight.shape
        module.A = nn.Parameter(torch.empty(r, columns, device="meta", dtype=torch.bfloat16))
        module.B = nn.Parameter(torch.empty(rows, r, device="meta", dtype=torch.bfloat16))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 329_056_256
    rows = MemoryEstimate(weight_bytes(model), 0, gradient_bytes(trained), optimizer_bytes(trained, "adamw"))
    assert round(rows.total / 1e9, 1) == 16.1


@pytest.mark.slow
def test_llama2_7b_is_traced_in_seconds_and_without_memory() -> None:
    before = resident_bytes()
    ids = torch.randint(3, 32000, (1, 1024))
    model, batch = llama2_7b(), {"input_ids": ids, "labels": ids}
    full = estimate(model, batch, optimizer="adamw")
    assert 59e9 < full.total < 62e9  # the survey's 60 GB
    assert estimate(model, batch, optimizer="adamw", checkpointing=True).activations < full.activations / 5
    assert resident_bytes() - before < 2e9


def llama2_7b() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig()).to(torch.bfloat16)  # the default configuration is LLaMA2-7B's


# ---------------------------------------------------------------------------------------------------------- against real runs
@pytest.mark.parametrize(("arch", "task"), CASES)
def test_saved_bytes_are_what_real_hooks_see(arch: str, task: Any) -> None:
    model, batch = tiny_model(arch, task=task), batch_for(task)
    there = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = forward_loss(model.train(), batch)
    assert saved_bytes(model, batch) == sum(n for key, n in seen.items() if key not in there)
    del graph


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_gradients_and_optimizer_are_exact_after_a_real_step(name: str, adapted: bool) -> None:
    model, batch = lora_llama() if adapted else tiny_model("llama", tied=True), batch_for("causal-lm")
    rows = estimate(model, batch, optimizer=name)
    forward_loss(model, batch)[0].backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    built = OPTIMIZERS[name].build(trained)
    built = [built] if isinstance(built, torch.optim.Optimizer) else list(built)
    for optimizer in built:
        optimizer.step()
    state = [t for o in built for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
    assert rows.weights == storage_bytes([*model.parameters(), *model.buffers()])
    assert rows.gradients == storage_bytes(p.grad for p in trained if p.grad is not None) == gradient_bytes(trained)
    assert rows.optimizer == storage_bytes(state) == optimizer_bytes(trained, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_formulas_agree_with_the_trace(name: str) -> None:
    model, batch = MLP(6, 5, 4), {"x": torch.randn(3, 6)}
    assert estimate(model, batch, optimizer=OPTIMIZERS[name].build, loss=total) == estimate(model, batch, optimizer=name, loss=total)


def test_parameters_that_get_no_gradient_have_neither_gradient_nor_state() -> None:
    model = MLP(4, 4, 4)
    model.idle = nn.Linear(100, 100)
    rows = estimate(model, {"x": torch.randn(2, 4)}, optimizer="adamw", loss=total)
    assert rows.gradients == F32 * 40 < rows.weights
    assert rows.optimizer == 2 * rows.gradients + 4 * F32


def test_a_foreach_step_holds_a_copy_of_what_is_trained() -> None:
    model, batch = tiny_model("llama"), batch_for("causal-lm")
    looped = estimate(model, batch, optimizer=lambda ps: torch.optim.AdamW(ps, foreach=False))
    whole = estimate(model, batch, optimizer=lambda ps: torch.optim.AdamW(ps, foreach=True))
    assert looped.step < whole.gradients <= whole.step
    assert whole.optimizer == looped.optimizer


def test_masks_are_decided_by_the_real_batch() -> None:
    """With nothing masked the attention needs no mask tensor; a trace that cannot read the mask would make one."""
    model, batch = tiny_model("llama"), batch_for("causal-lm", size=2, length=128)
    masked = estimate(model, batch, optimizer="sgd").activations
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert masked - estimate(model, batch, optimizer="sgd").activations >= 2 * 128 * 128


# ------------------------------------------------------------------------------------------------------------------ behavior
def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = lora_llama(dropout=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    estimate(model, batch_for("causal-lm"), optimizer="adamw", checkpointing=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert not model.is_activation_checkpointing
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_activations_are_affine_in_the_batch(arch: str) -> None:
    model = tiny_model(arch)
    one, two, three = (
        estimate(model, {k: v[1:] for k, v in batch_for("causal-lm", size=n + 1).items()}, optimizer="sgd").activations for n in (4, 8, 12)
    )
    assert three - two == two - one > 0
    assert two > 1.9 * one


def test_every_row_grows_with_the_rank() -> None:
    low, mid, high = (dataclasses.asdict(estimate(lora_llama(r), batch_for("causal-lm"), optimizer="adamw")) for r in (1, 4, 16))
    for name in ("weights", "activations", "gradients", "optimizer"):
        assert low[name] < mid[name] < high[name]


def test_layers_below_the_lowest_trainable_one_need_no_activations() -> None:
    bottom, top = (saved_bytes(lora_llama(sites=f"model.layers.{i}.mlp.down_proj"), batch_for("causal-lm")) for i in (0, 1))
    assert top < 0.8 * bottom


@pytest.mark.parametrize("build", [lambda: tiny_model("gpt2"), lora_llama], ids=["gpt2", "lora"])
def test_checkpointing_keeps_only_layer_inputs(build: Any) -> None:
    batch = batch_for("causal-lm", length=64)
    plain, checkpointed = (estimate(build(), batch, optimizer="sgd", checkpointing=c) for c in (False, True))
    assert checkpointed.activations < 0.75 * plain.activations
    assert dataclasses.replace(checkpointed, activations=0) == dataclasses.replace(plain, activations=0)


def test_a_model_that_checkpoints_already_is_traced_as_it_is() -> None:
    model, batch = lora_llama(), batch_for("causal-lm", length=64)
    wanted = estimate(model, batch, optimizer="sgd", checkpointing=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert estimate(model, batch, optimizer="sgd") == wanted


def test_ignored_tokens_need_no_logits() -> None:
    model, batch = tiny_model("llama", vocab_size=4096), batch_for("causal-lm", length=64)
    all_of_them = estimate(model, batch, optimizer="sgd").activations
    batch["labels"][:, :48] = -100
    assert estimate(model, batch, optimizer="sgd").activations < all_of_them / 2


def test_a_model_on_meta_gives_the_rows_of_a_real_one() -> None:
    real, batch = tiny_model("llama"), batch_for("causal-lm")
    with torch.device("meta"):
        meta = LlamaForCausalLM(real.config)
    assert estimate(meta, batch, optimizer="adamw") == estimate(real, batch, optimizer="adamw")


# -------------------------------------------------------------------------------------------------------------------- answers
ROWS = MemoryEstimate(weights=14_000, activations=6_000, gradients=1_000, optimizer=2_000, step=500)


def test_total_counts_the_larger_of_activations_and_step() -> None:
    assert ROWS.total == 23_000
    assert dataclasses.replace(ROWS, step=7_000).total == 24_000
    assert ROWS.as_dict() == {"weights": 14_000, "activations": 6_000, "gradients": 1_000, "optimizer": 2_000, "step": 500, "total": 23_000}


def test_fits_names_the_binding_row_and_the_cure() -> None:
    assert ROWS.fits(23_000)
    assert not ROWS.fits(22_999)
    assert ROWS.fits(1).binding == "weights"
    assert "fewer bits" in str(ROWS.fits(1))
    fit = dataclasses.replace(ROWS, activations=10**12).fits(parse_bytes("24GB"))
    assert str(fit).startswith("does not fit: 1000.00 GB needed of 24.00 GB, most of it activations; use gradient checkpointing")


def test_table_prints_every_row() -> None:
    out = io.StringIO()
    Console(width=100, file=out).print(ROWS.table())
    text = out.getvalue()
    assert all(name in text for name in ROWS.as_dict())
    assert "23,000" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5g", 15 * 10**8), ("512MiB", 2**29), ("100", 100), ("80kb", 80_000)],
)
def test_parse_bytes(text: str, wanted: int) -> None:
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-3GB", "1.2.3GB"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(BadParameter, match="write for example 24GB"):
        parse_bytes(text)


# -------------------------------------------------------------------------------------------------------------------- errors
def test_an_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(BadParameter, match="'adamw'"):
        estimate(MLP(2, 2, 2), {"x": torch.randn(1, 2)}, optimizer="adamv", loss=total)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(BadParameter, match="nothing is trainable"):
        estimate(MLP(2, 2, 2).requires_grad_(False), {"x": torch.randn(1, 2)}, optimizer="sgd", loss=total)


def test_a_loss_that_uses_another_model_is_refused_and_cleaned_up() -> None:
    model = MLP(2, 2, 2)
    with pytest.raises(BadParameter, match="loss must use the model it is given"):
        estimate(model, {"x": torch.randn(1, 2)}, optimizer="sgd", loss=lambda _, batch: total(model, batch))
    assert all(p.grad is None for p in model.parameters())


def test_a_forward_that_reads_its_own_values_is_refused() -> None:
    def nosy(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch["x"])
        return out.sum() if out.sum() > 0 else -out.sum()

    with pytest.raises(Incompatible, match=r"use measure\(\)"):
        estimate(MLP(2, 2, 2), {"x": torch.randn(1, 2)}, optimizer="sgd", loss=nosy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(BadParameter, match="not on this machine"):
        estimate(MLP(2, 2, 2), {"x": torch.randn(1, 2)}, optimizer="sgd", loss=total, device="cuda")


def test_checkpointing_a_plain_module_is_refused() -> None:
    with pytest.raises(Incompatible, match="Transformers model"):
        estimate(MLP(2, 2, 2), {"x": torch.randn(1, 2)}, optimizer="sgd", loss=total, checkpointing=True)


# ---------------------------------------------------------------------------------------------------------- in a fresh process
def mid_llama(*, dtype: torch.dtype = torch.float32, attention: str = "sdpa", r: int | None = None) -> nn.Module:
    config = LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    return model if r is None else attach(model, get_method("lora", r=r)).model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "checkpointing"),
    [({}, False), ({}, True), ({"dtype": torch.bfloat16}, False), ({"attention": "eager"}, False), ({"r": 16}, False), ({"r": 16}, True)],
    ids=["full", "full-checkpointed", "bfloat16", "eager", "lora", "lora-checkpointed"],
)
def test_estimate_equals_what_a_fresh_process_needs(kwargs: dict[str, Any], checkpointing: bool) -> None:
    torch.manual_seed(0)
    model, ids = mid_llama(**kwargs), torch.randint(3, 8000, (4, 512))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    expected = estimate(model, batch, optimizer="adamw", checkpointing=checkpointing)
    found = measure(model, batch, optimizer="adamw", checkpointing=checkpointing)
    assert expected.activations > 60e6
    assert (expected.weights, expected.gradients, expected.optimizer) == (found.weights, found.gradients, found.optimizer)
    assert math.isclose(expected.activations, found.activations, rel_tol=0.01)  # torch's allocator; 10 % is asked for
    assert math.isclose(expected.step, found.step, rel_tol=0.01)
    if found.resident is not None:
        assert math.isclose(expected.activations, found.resident, rel_tol=0.1)  # the operating system


@pytest.mark.slow
def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="nothing is trainable"):
        measure(MLP(2, 2, 2).requires_grad_(False), {"x": torch.randn(1, 2)}, optimizer="sgd")
