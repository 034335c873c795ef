"""DPO and KTO in whole runs: compiled, quantized, in sequence, in two processes, from an adapter; with penalties, patches and resuming."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from lorakit import Adapted, get_method
from lorakit.core.attach import attach
from lorakit.core.errors import Incompatible
from lorakit.core.events import Step
from lorakit.data.preference import Rated, collate_feedback, collate_preferences, tokenize_answers
from lorakit.train import compile as compile_module
from lorakit.train.compile import CompiledLayers, compile_layers
from lorakit.train.distributed import World, world
from lorakit.train.preference import DPO, KTO, Ratios
from lorakit.train.run import Run
from lorakit.train.train import build, train
from tests.laws.subject import awaken, base
from tests.train.runs import command, config, finish, start, stopped
from tests.train.test_distributed import FLAGS, launched
from tests.train.test_preference import JUDGED, LN2, PAIRS, TOKENIZER, judged, preferred, rows, settings
from tests.train.test_resume import adapter_bytes, steps_and_losses

EAGERLY = lookup_backend("aot_eager")
FIRST = {"dpo": LN2, "kto": 0.5}
both = pytest.mark.parametrize("kind", sorted(FIRST))


def made(tmp: Path, kind: str, **keys: Any) -> Any:
    return settings(tmp, kto=kind == "kto", **({"save_steps": 0} | keys))


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


def awake(**keys: Any) -> Adapted:
    return awaken(attach(base(vocab_size=len(TOKENIZER)), get_method("lora", r=4, **keys)), size=0.2)


# --- compiled ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[CompiledLayers]:
    """What runs compile."""
    found: list[CompiledLayers] = []

    def keep(*args: Any, **keys: Any) -> CompiledLayers:
        found.append(compile_layers(*args, **keys))
        return found[-1]

    monkeypatch.setattr("lorakit.train.train.compile_layers", keep)
    return found


def check_compiled(tmp: Path, kind: str, layers: list[CompiledLayers], **keys: Any) -> None:
    """It starts at the same bits, and trains as eager layers do; nothing is compiled later than in the first steps."""
    keys = {"max_steps": 6, "learning_rate": 2e-2} | keys
    for on in (False, True):
        train(made(tmp, kind, output_dir=str(tmp / str(on)), torch_compile=on, **keys), quiet=True)
    eager, compiled = (losses(tmp / str(on)) for on in (False, True))
    assert compiled[0] == FIRST[kind]
    assert compiled == pytest.approx(eager, abs=2e-2 if "dtype" in keys else 2e-4)
    assert abs(compiled[-1] - compiled[0]) > 1e-3, "nothing was learned: the test shows nothing"
    assert layers[-1].notes == []


@pytest.mark.parametrize("kind", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_compiled_runs_start_at_the_same_bits_and_train_as_eager(
    tmp_path: Path, kind: str, layers: list[CompiledLayers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "inductor", EAGERLY)
    check_compiled(tmp_path, kind, layers)
    assert layers[-1].graphs in (3, 6), "the reference's, the first layer's and the others'; as many for rows without padding"


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"gradient_checkpointing": True}, {"quantize": "nf4"}, {"dropout": 0.2}, {"method": "dora"}], ids=str)
def test_what_else_acts_in_forward_is_compiled_too(
    tmp_path: Path, keys: dict[str, Any], layers: list[CompiledLayers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "inductor", EAGERLY)
    check_compiled(tmp_path, "dpo", layers, **keys)


@pytest.mark.slow
@both
def test_a_compiled_adapter_that_goes_on_is_its_own_reference(
    tmp_path: Path, kind: str, layers: list[CompiledLayers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "inductor", EAGERLY)
    train(config(tmp_path, output_dir=str(tmp_path / "sft"), learning_rate=5e-2, save_steps=0), quiet=True)
    check_compiled(tmp_path, kind, layers, init_adapter=str(tmp_path / "sft" / "adapter"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inductor_starts_at_the_same_bits(tmp_path: Path, dtype: str, layers: list[CompiledLayers]) -> None:
    """Without rounding wherever the layer does, its two graphs would differ in bf16; with an eager reference, in fp32 too."""
    check_compiled(tmp_path, "dpo", layers, dtype=dtype)


def test_auto_leaves_padded_batches_eager(tmp_path: Path, layers: list[CompiledLayers]) -> None:
    parts = build(made(tmp_path, "dpo", dtype="bfloat16"), world())
    assert parts.choice == "no, since batches are padded to varying lengths"
    assert layers == []


# --- how a step is divided --------------------------------------------------------------------------------------------------------------


class Pair(World):
    """Two processes that are asked one after the other: what one says is kept, and what the other one said is added."""

    said: list[Tensor]
    other: Tensor

    def total_(self, tensor: Tensor) -> None:
        self.said.append(tensor.clone())
        tensor += self.other


def one_of_two(other: Tensor) -> Pair:
    made = Pair(0, 2, torch.device("cpu"), sharded=False)
    made.__dict__.update(said=[], other=other)
    return made


def test_ktos_divergence_is_that_of_the_micro_batch_of_all_processes() -> None:
    """Two halves that hear of each other's divergence are the whole; the parts of a step are not."""
    adapted, aim = awake(), KTO(0.3, 1.5, 0.5)
    samples = tokenize_answers(TOKENIZER, JUDGED, max_length=64).samples

    def of(part: list[Rated], world: World | None = None) -> Tensor:
        return aim(Ratios(adapted.model, adapted, world=world), collate_feedback(part, 0)).sums

    whole, halves, said = of(samples), [samples[:2], samples[2:]], list[Tensor]()
    for half in halves:
        of(half, first := one_of_two(torch.zeros(2)))
        said += first.said
    together = of(halves[0], one_of_two(said[1])) + of(halves[1], one_of_two(said[0]))
    assert torch.allclose(together, whole, atol=1e-4)
    assert whole[-1] > 0.01, "no divergence: the test shows nothing"
    assert (of(halves[0]) + of(halves[1]) - whole).abs().max() > 1e-3


@both
@pytest.mark.parametrize("size", [1, 2, 5])
def test_held_out_figures_do_not_depend_on_batches(kind: str, size: int) -> None:
    adapted = awake()
    aim = KTO(0.3, 1.5, 0.5) if kind == "kto" else DPO(0.3)
    collate: Any = collate_feedback if kind == "kto" else collate_preferences
    samples: Any = tokenize_answers(TOKENIZER, JUDGED if kind == "kto" else PAIRS, max_length=64).samples
    adapted.model.eval()
    with torch.no_grad():
        want = aim(Ratios(adapted.model, adapted), collate(samples[:], 0))
        batches = [collate(samples[i : i + size], 0) for i in range(0, len(samples), size)]
        found = aim.judge(adapted.model, batches, world(), adapted)
    totals = want.sums.tolist()
    assert found == pytest.approx({"loss": aim.mean(totals)} | aim.figures(totals), abs=1e-5)
    assert kind == "dpo" or found["kl"] > 0.01


@pytest.mark.slow
@both
@pytest.mark.parametrize("how", sorted(FLAGS))
def test_two_processes_end_where_one_ends(tmp_path: Path, kind: str, how: str) -> None:
    """Micro-batches, an epoch's last step and held-out shares of uneven size included: 27 items in steps of 8, 3 held out."""
    data = (judged if kind == "kto" else preferred)(tmp_path / "some.jsonl", 27)
    held = (judged if kind == "kto" else preferred)(tmp_path / "held.jsonl", 3, seed=1)
    keys = {
        "train_data": data,
        "eval_data": held,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    keys |= {"lr_scheduler_type": "constant", "per_device_eval_batch_size": 1}
    finish(start(command(made(tmp_path, kind, output_dir=str(tmp_path / "one"), **keys, per_device_train_batch_size=4))))
    two = command(made(tmp_path, kind, output_dir=str(tmp_path / "two"), **keys, per_device_train_batch_size=2))
    port = 20000 + (os.getpid() + 29) % 20000
    finish(start(launched(two, port, how), ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""))
    alone, together = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert alone[0]["loss"] == together[0]["loss"] == FIRST[kind]
    assert len(alone) == len(together)
    for before, after in zip(alone, together, strict=True):
        told = [key for key in before if key.removeprefix("eval_") in ("loss", "margin", "accuracy", "kl", "reward_chosen")]
        assert len(told) > 3
        assert [after[key] for key in told] == pytest.approx([before[key] for key in told], abs=1e-3)
    assert abs(alone[3]["loss"] - alone[0]["loss"]) > 1e-2, "nothing was learned: the test shows nothing"
    assert kind == "dpo" or max(row.get("kl", 0) for row in alone) > 1e-2


# --- what else a run may be -------------------------------------------------------------------------------------------------------------


def test_feedback_over_nf4_and_tasks_in_sequence(tmp_path: Path) -> None:
    train(
        made(tmp_path, "kto", quantize="nf4", dtype="bfloat16", output_dir=str(tmp_path / "nf4"), max_steps=4, learning_rate=2e-2),
        quiet=True,
    )
    found = losses(tmp_path / "nf4")
    assert found[0] == 0.5
    assert found[-1] < 0.49
    wanted = tmp_path / "b.jsonl"
    wanted.write_text("".join(json.dumps({"prompt": f"p{i} ", "completion": "ok" * (1 + i % 3), "label": True}) + "\n" for i in range(20)))
    two = [judged(tmp_path / "a.jsonl", seed=1), str(wanted)]
    result = train(made(tmp_path, "kto", train_data=two, max_steps=6, output_dir=str(tmp_path / "two")), quiet=True)
    assert [len(seen) for seen in result.tasks] == [1, 2]
    assert {"accuracy", "margin", "kl", "forgetting"} <= set(result.final)
    assert losses(tmp_path / "two")[0] == 0.5
    (note,) = result.notes
    assert "only desirable ones have a weight" in note, "what is odd about a later task is said too"


def test_keys_that_the_task_does_not_know_are_noted(tmp_path: Path) -> None:
    def notes(kind: str, **keys: Any) -> list[str]:
        return build(made(tmp_path, kind, **keys), world()).adapted.notes

    assert notes("dpo", desirable_weight=2.0, train_on="last") == ["desirable_weight, train_on: without effect on task=dpo"]
    assert notes("kto", train_on="all", beta=0.3, desirable_weight=1.1) == ["train_on: without effect on task=kto"]
    assert notes("dpo", beta=0.3) == []
    (packing,) = notes("dpo", packing=True)
    assert "padded" in packing
    assert build(config(tmp_path, beta=0.3), world()).adapted.notes == ["beta: without effect on task=causal-lm"]


def test_a_balanced_mixture_is_refused_by_the_parameter_that_makes_it_one(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="loramoe makes its loss of predicted tokens .* loramoe: balance=0"):
        build(made(tmp_path, "kto", method="loramoe", experts=4, balance=0.1), world())
    build(made(tmp_path, "kto", method="loramoe"), world())


@both
def test_a_penaltys_gradient_is_in_the_update(tmp_path: Path, kind: str) -> None:
    """AdaLoRA's orthogonality, once a step beside the mean of the losses."""
    grads = {}
    for orth in (0.0, 0.5):
        parts = build(made(tmp_path, kind, method="adalora", orth=orth, tfinal=0, gradient_accumulation_steps=2), world())
        run = Run(parts.adapted, parts.data, parts.config, world(), out=None, quiet=True)
        awaken(parts.adapted, size=0.2)
        parts.adapted.model.train()
        run.gradients(next(run.stream()), Step(0, 4))
        grads[orth] = {row.name: row.tensor.grad.clone() for row in run.table if row.tensor.grad is not None}
        for row in run.table:
            row.tensor.grad = None
        for penalty in run.method.penalties:
            penalty(parts.adapted, parts.adapted.context).backward()
        alone = {row.name: row.tensor.grad for row in run.table if row.tensor.grad is not None}
    for name, grad in grads[0.5].items():
        assert torch.allclose(grad, grads[0.0][name] + alone.get(name, torch.zeros(())), atol=1e-6), name
    assert any(bool(grad.abs().max() > 1e-3) for grad in alone.values())


@pytest.mark.slow
@both
@pytest.mark.parametrize("method", ["adalora", "relora", "dylora", "bilora"])
def test_a_run_of_a_method_with_a_state_cut_in_two_ends_with_the_same_bytes(
    tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"method": method, "max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}
    keys["per_device_train_batch_size"] = 2
    train(made(tmp_path, kind, output_dir=str(tmp_path / "whole"), **keys), quiet=True)
    cut = made(tmp_path, kind, output_dir=str(tmp_path / "cut"), **keys)
    stopped(cut, 5, monkeypatch)
    train(cut.model_copy(update={"resume": "auto"}), quiet=True)
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "cut")
    assert steps_and_losses(tmp_path / "whole") == steps_and_losses(tmp_path / "cut")


def test_a_run_from_an_adapter_resumes_against_the_same_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path, output_dir=str(tmp_path / "sft"), learning_rate=5e-2, save_steps=0), quiet=True)
    keys = {"init_adapter": str(tmp_path / "sft" / "adapter"), "max_steps": 5, "save_steps": 2, "dropout": 0.2}
    train(made(tmp_path, "kto", output_dir=str(tmp_path / "whole"), **keys), quiet=True)
    assert losses(tmp_path / "whole")[0] == 0.5, "the reference drops as the policy does"
    cut = made(tmp_path, "kto", output_dir=str(tmp_path / "cut"), **keys)
    stopped(cut, 3, monkeypatch)
    train(cut.model_copy(update={"resume": "auto"}), quiet=True)
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "cut")
