"""Methods under the real transformers.Trainer: every part takes effect as in lorakit's own run, what cannot is refused, checkpoints hold
the adapter alone and go on bit by bit. (TRL's trainers: test_outside_trl.py.)"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorakit import Adapted, BadParameter, Incompatible, NotExportable, adapter_trainer, attach, get_method, list_methods, load
from lorakit.adapters.io import load_adapter
from lorakit.core.errors import CheckpointError
from lorakit.core.events import Controller, Step
from lorakit.parts.penalties.orthogonal import Orthogonal
from lorakit.train.outside import AdapterTrainerMixin
from lorakit.train.stream import Stream
from lorakit.train.train import train
from tests.laws.steps import Run as Reference
from tests.laws.subject import attached, base, batch, everything, logits, same_bits, small, subject
from tests.train.runs import config, finish, start

Trained = adapter_trainer(transformers.Trainer)


def arguments(out: Path, **keys: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential", "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False, "log_level": "error",
    }  # fmt: skip
    return transformers.TrainingArguments(**(settings | keys))


def rows(n: int = 16) -> list[dict[str, Tensor]]:
    """Batch i of `tests/laws` is rows 2 i and 2 i + 1."""
    return [{"input_ids": ids, "labels": ids} for i in range(n // 2) for ids in batch(i)]


def uneven(n: int = 16) -> list[dict[str, Tensor]]:
    """Rows of which very different shares have labels."""
    found = rows(n)
    return [row | {"labels": torch.where(torch.arange(7) < i % 6, -100, row["labels"])} for i, row in enumerate(found)]


def trainer(adapted: Adapted, out: Path, data: Any = None, cls: Any = Trained, **keys: Any) -> Any:
    more = {k: keys.pop(k) for k in ("data_collator", "eval_dataset", "callbacks", "optimizers") if k in keys}
    return cls(adapted=adapted, args=arguments(out, **keys), train_dataset=rows() if data is None else data, **more)


def tensors(adapted: Adapted) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in adapted.tensors(adapted.active[0]).items()}


# ------------------------------------------------------------------------------------------------------------- every method
REFUSED = {"bilora": "BilevelSpec", "dfo_lora": "AskTellSpec", "hiddenkey": "Agreement"}


@pytest.mark.parametrize("name", list_methods())
def test_every_method_trains_or_is_refused(name: str, tmp_path: Path) -> None:
    adapted = subject(name)
    if name in REFUSED:
        with pytest.raises(Incompatible, match=f"{name} makes its own .*{REFUSED[name]}.*lorakit train --method {name}"):
            trainer(adapted, tmp_path)
        return
    trains = {id(p.tensor): p.name for p in adapted.params()}
    before = everything(adapted.model)
    trained = {n for n, p in adapted.model.named_parameters() if id(p) in trains}
    mine = trainer(adapted, tmp_path)
    mine.train()
    with adapted.disabled():  # the base gives back what it absorbed
        pass
    after = everything(adapted.model)
    grown = {n for n in before if n not in after or before[n].shape != after[n].shape}
    moved = {n for n in before.keys() & after.keys() - grown if not same_bits(before[n], after[n])}
    still = trained - moved - grown
    assert not still, f"did not move: {sorted(still)[:5]}"
    ours = {n for n in moved if ".lora." in n or n.startswith("lora_shared.")} | trained
    assert moved <= ours, f"moved, and is no adapter's: {sorted(moved - ours)[:5]}"
    mine.save_model(str(tmp_path / "saved"))
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {"adapter.json", "adapter.safetensors"}
    again = load(base(), tmp_path / "saved")
    assert same_bits(logits(again.model, batch()), logits(adapted.model, batch()))
    plain = logits(base(), batch())
    assert same_bits(logits(adapted.detach(), batch()), plain) or name == "qlora"


# --------------------------------------------------------------------------------------------------- as in lorakit's own run
OWN: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.2},
    "loraplus": {"ratio": 4.0},
    "adalora": {"r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "delta_t": 1, "orth": 0.5},
    "increlora": {"target_r": 4, "add": 2, "ramp": 2},
    "relora": {"period": 3, "warmup": 2},
    "sora": {"xi": 0.05, "stages": 3, "per_rate": True},
    "dylora": {"r": 4},
    "lora_fa": {"correct": True},
    "riemannian": {},
    "delta_lora": {"start": 2},
    "dropbp": {"sensitivity": False},
}


@pytest.mark.parametrize("name", sorted(OWN))
def test_it_ends_where_lorakits_own_run_ends(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches and schedule, with gradients accumulated over uneven batches and clipped: the same adapter. In fp64 where a step
    divides by very small numbers."""
    wide = torch.float64 if name in ("dropbp", "riemannian") else torch.float32
    monkeypatch.setattr("lorakit.train.train.attach", lambda model, *args, **keys: attach(model.to(wide), *args, **keys))
    fed: list[dict[str, Tensor]] = []
    real = Stream.__next__

    def recorded(self: Stream) -> list[Any]:
        found = real(self)
        fed.extend(found)
        return found

    monkeypatch.setattr(Stream, "__next__", recorded)
    keys = {"packing": False, "max_steps": 8, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "lr_scheduler_type": "cosine"}
    settings = config(tmp_path, method=name, warmup_steps=2, weight_decay=0.01, **keys, **OWN[name])
    train(settings, quiet=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).to(wide)
    mine = trainer(
        attach(model, settings.build_method()), tmp_path / "outside", fed, max_steps=8, gradient_accumulation_steps=2, warmup_steps=2,
        per_device_train_batch_size=1, max_grad_norm=0.05, lr_scheduler_type="cosine", weight_decay=0.01, seed=0,
        data_collator=lambda found: dict(found[0]), remove_unused_columns=False, learning_rate=settings.learning_rate,
    )  # fmt: skip
    mine.train()
    inside = load_adapter(tmp_path / "out" / "adapter").tensors
    outside = mine.adapted.state().tensors
    assert inside.keys() == outside.keys()
    worst = max(float((inside[k].double() - outside[k].double()).abs().max()) for k in inside if inside[k].numel())
    assert worst < 1e-6, worst
    assert any(float(v.abs().max()) > 0 for k, v in outside.items() if k.endswith(".B"))


class Watch(transformers.TrainerCallback):
    """Keeps the gradients that the optimizer sees, by parameter."""

    def __init__(self, adapted: Adapted) -> None:
        self.adapted, self.seen = adapted, list[dict[str, Tensor]]()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append({p.name: p.tensor.grad.clone() for p in self.adapted.params() if p.tensor.grad is not None})


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_penalty_is_in_the_gradient_once(accumulated: int, tmp_path: Path) -> None:
    """Whatever the micro-batches: the gradient of the mean over all their targets, plus the penalty's."""
    adapted = subject("adalora", tfinal=1)
    twin = subject("adalora", tfinal=1)
    watch, data = Watch(adapted), uneven(18)
    keys = {"max_steps": 2, "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0}
    trainer(adapted, tmp_path, data, callbacks=[watch], **keys).train()
    n = 2 * accumulated
    ids, labels = (torch.stack([row[k] for row in data[:n]]) for k in ("input_ids", "labels"))
    found = twin.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(found, labels[:, 1:].flatten()).backward()
    (penalty,) = twin.methods["default"].penalties
    assert isinstance(penalty, Orthogonal)
    without = {p.name: p.tensor.grad.clone() for p in twin.params()}
    penalty(twin, twin.context).backward()
    for p in twin.params():
        assert torch.allclose(watch.seen[0][p.name], p.tensor.grad, atol=1e-6, rtol=1e-5), p.name
    assert max(float((watch.seen[0][k] - without[k]).abs().max()) for k in without) > 1e-4, "the penalty is too small to be seen"


def test_adaloras_budget_is_reached_whatever_the_scheduler(tmp_path: Path) -> None:
    adapted = attached(base(), get_method("adalora", r=4, target_r=2, tfinal=2))
    optimizer = None
    mine = trainer(adapted, tmp_path, optimizers=(optimizer, None), max_steps=10, lr_scheduler_type="linear", max_grad_norm=0.1)
    mine.train()
    gates = [b.delta.g for b in adapted.branches()]
    assert sum(int((g != 0).sum()) for g in gates) == 2 * len(gates)


def test_controllers_see_the_step_as_it_is(tmp_path: Path) -> None:
    """Order, gradients before clipping and after, the factor of clipping, and a rate that the Trainer's scheduler does not know of."""
    told: list[tuple[str, int, float, float, float]] = []

    class Spec:
        requires: frozenset[str] = frozenset()

        def build(self, run: Any) -> Controller:
            return Teller(run)

    class Teller(Controller):
        def __init__(self, run: Any) -> None:
            self.run = run

        def tell(self, what: str, step: Step) -> None:
            grads = [p.tensor.grad for p in self.run.adapted.params() if p.tensor.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads)) if grads else -1.0
            told.append((what, step.index, norm, self.run.optimizer.param_groups[0]["lr"], step.clip))

        def rate(self, step: Step) -> float:
            return 0.5 if step.index == 1 else 1.0

        def start(self) -> None:
            told.append(("start", 0, 0.0, 0.0, 0.0))

        def before_forward(self, step: Step) -> None:
            self.tell("before_forward", step)

        def after_backward(self, step: Step) -> None:
            self.tell("after_backward", step)

        def after_step(self, step: Step) -> None:
            self.tell("after_step", step)

        def finish(self) -> None:
            told.append(("finish", 0, 0.0, 0.0, 0.0))

    method = get_method("lora", r=2).but(controllers=(Spec(),))

    class Halved(transformers.Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)  # it goes on from the rate that it finds
            return self.lr_scheduler

    keys = {"max_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.02}
    mine = trainer(attach(base(), method), tmp_path, cls=adapter_trainer(Halved), **keys)
    mine.train()
    names = ["before_forward", "after_backward", "after_step"]
    assert [t[0] for t in told] == ["start", *names, *names, "finish"]
    for first, second, third, rate in ((*told[1:4], 1e-2), (*told[4:7], 0.5 * 0.5e-2)):
        assert first[2] == -1.0
        assert second[2] > 0.02
        assert third[2] == pytest.approx(0.02, rel=1e-3)
        assert third[4] == pytest.approx(third[2] / second[2], rel=1e-5)
        assert third[3] == pytest.approx(rate)
    assert mine.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-2), "the factor of step 1 is not left behind"


def test_groups_of_the_method_and_the_trainers_schedule(tmp_path: Path) -> None:
    mine = trainer(attach(base(), get_method("loraplus", r=2, ratio=8.0)), tmp_path, max_steps=4, lr_scheduler_type="linear")
    rates = []

    class Rates(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            rates.append([group["lr"] for group in mine.optimizer.param_groups])

    mine.add_callback(Rates())
    mine.train()
    for step, (a, b) in enumerate(rates):
        assert b == pytest.approx(8.0 * a)
        assert a == pytest.approx(1e-2 * (1 - step / 4))


def test_masks_follow_from_the_seed_and_the_number_of_the_micro_batch(tmp_path: Path) -> None:
    """Equal under activation checkpointing, another with another seed, and as lorakit's own steps draw them."""
    ends = []
    for keys in ({}, {"activation_checkpointing": True}, {"seed": 7}):
        mine = trainer(attached(base(), small("lora", dropout=0.5)), tmp_path, **keys)
        mine.train()
        ends.append(tensors(mine.adapted))
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-6) for k in ends[0])
    assert any(not torch.allclose(ends[0][k], ends[2][k], atol=1e-3) for k in ends[0])
    run = Reference(attached(base(), small("lora", dropout=0.5)), total=3)
    own = tensors(run.steps(3).finish())
    seeded = trainer(attached(base(), small("lora", dropout=0.5)), tmp_path, seed=run.adapted.seed)
    seeded.train()
    assert all(torch.allclose(own[k], v, atol=1e-6) for k, v in tensors(seeded.adapted).items())


def test_a_step_without_any_backward_is_a_step(tmp_path: Path) -> None:
    """DropBP may leave out every sublayer: the Trainer has nothing to go back to, and goes on."""
    adapted = attached(base(), get_method("dropbp", r=2, p_target=1.0, sensitivity=False, length=8))
    trainer(adapted, tmp_path, max_steps=3).train()


def test_dropbp_measures_on_data_of_its_own(tmp_path: Path) -> None:
    """Its stream is beside the Trainer's order, which it does not change."""
    keys = {"max_steps": 12, "train_sampling_strategy": "random", "dataloader_num_workers": 0}
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    runs: list[Any] = []
    for sensitivity in (True, False):
        adapted = attached(base(), get_method("dropbp", r=2, p_target=0.3, sensitivity=sensitivity, length=8))
        mine = trainer(adapted, tmp_path, **keys)
        real = mine.training_step

        def step(
            model: nn.Module, inputs: dict[str, Tensor], *rest: Any, real: Any = real, to: bool = sensitivity, trained: Any = mine
        ) -> Tensor:
            seen[to].append(inputs["input_ids"].clone())
            runs.append(trained._run)
            return real(model, inputs, *rest)

        mine.training_step = step
        mine.train()
        if sensitivity:
            (drop,) = runs[-1].controllers
            assert len(set(drop.rates.tolist())) > 1
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))


# ------------------------------------------------------------------------------------------------------------------- files
RESUMED: dict[str, dict[str, Any]] = {
    "lora": {"r": 2, "dropout": 0.2},
    "adalora": {"r": 4, "target_r": 2, "tfinal": 2, "delta_t": 2},
    "dora": {"r": 2},
    "dropbp": {"r": 2, "length": 8},
    "dylora": {"r": 4, "dropout": 0.2},
    "increlora": {"init_r": 1, "target_r": 3, "add": 1, "ramp": 2},
    "loraplus": {"r": 2},
    "relora": {"r": 2, "period": 2, "warmup": 1},
    "riemannian": {"r": 2},
    "sora": {"r": 2, "xi": 0.05, "stages": 3},
    "vera": {"r": 4},
}


@pytest.mark.parametrize("name", sorted(RESUMED))
def test_resuming_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """In the middle of an epoch of a random order and of a schedule, with dropout of the model's own; once by attaching anew, once by
    loading the checkpoint."""
    keys = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "train_sampling_strategy": "random", "lr_scheduler_type": "cosine"}
    keys |= {"gradient_accumulation_steps": 2, "logging_strategy": "steps", "logging_steps": 1, "max_grad_norm": 0.5}
    model = {"attention_dropout": 0.1}

    def fresh() -> Adapted:
        return attach(base(**model), get_method(name, **RESUMED[name]))

    whole = trainer(fresh(), tmp_path / "whole", uneven(), **keys)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-5"
    for adapted in (fresh(), load(base(**model), folder)):
        again = trainer(adapted, tmp_path / "again", uneven(), **keys)
        again.train(resume_from_checkpoint=str(folder))
        ends, expected = tensors(again.adapted), tensors(whole.adapted)
        assert ends.keys() == expected.keys()
        assert all(same_bits(ends[k], expected[k]) for k in expected)
        assert [h["loss"] for h in again.state.log_history if "loss" in h] == [h["loss"] for h in whole.state.log_history if "loss" in h]


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    """What a controller reads of the data beside the Trainer."""
    seen: list[list[int]] = []

    class Spec:
        requires: frozenset[str] = frozenset()

        def build(self, run: Any) -> Controller:
            return Reader(run)

    class Reader(Controller):
        def __init__(self, run: Any) -> None:
            self.data = run.stream(0.25, 1.0)

        def before_forward(self, step: Step) -> None:
            seen.append([int(row[0]) for batch in next(self.data) for row in batch["input_ids"]])

    lora = get_method("lora", r=2)
    method = replace(lora.but(controllers=(Spec(),)), recipe=lora.recipe)
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    trainer(attach(base(), method), tmp_path, **keys).train()
    whole = list(seen)
    assert all(len(some) == 4 for some in whole)
    assert len({number for some in whole[:3] for number in some}) > 8, "three quarters of 16 rows, each once"
    trainer(attach(base(), method), tmp_path, **keys).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen[6:] == whole[3:]


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(tmp_path: Path) -> None:
    adapted = attached(base(), small("adalora"))
    mine = trainer(adapted, tmp_path, save_strategy="steps", save_steps=2, max_steps=4, save_total_limit=1)
    mine.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    names = {"adapter.json", "adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert {p.name for p in folder.iterdir()} == names | {"state.json", "state.safetensors"}
    held = load_adapter(folder)
    assert held.tensors.keys() == adapted.tensors("default").keys()
    assert held.meta["steps"] == 4
    mine.save_model()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors", "checkpoint-4"]
    assert (folder / "optimizer.pt").exists()


def test_resuming_another_methods_checkpoint_is_refused(tmp_path: Path) -> None:
    keys = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(attach(base(), get_method("lora", r=2)), tmp_path, **keys).train()
    folder = str(tmp_path / "checkpoint-2")
    for other in (get_method("rslora", r=2), get_method("lora", r=2, alpha=4.0), get_method("lora", r=2, sites="attention")):
        with pytest.raises(CheckpointError, match="checkpoint-2 was made by|adapts other sites"):
            trainer(attach(base(), other), tmp_path, **keys).train(resume_from_checkpoint=folder)


def test_a_checkpoint_without_the_controllers_is_refused(tmp_path: Path) -> None:
    keys = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(attached(base(), small("adalora")), tmp_path, save_only_model=True, **keys).train()
    with pytest.raises(CheckpointError, match="no state of the method's controllers"):
        trainer(attached(base(), small("adalora")), tmp_path, **keys).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", ["lora", "increlora"])
def test_the_best_checkpoint_comes_back_in_the_end(name: str, tmp_path: Path) -> None:
    """Where more loss counts as better, the first evaluation is the best, and its ranks are fewer."""
    known = {"lora": {"r": 2}, "increlora": {"init_r": 1, "target_r": 3, "add": 1}}
    adapted = attach(base(), get_method(name, **known[name]))
    mine = trainer(
        adapted, tmp_path, max_steps=8, learning_rate=0.1, eval_dataset=rows(4), eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    mine.train()
    losses = [h["eval_loss"] for h in mine.state.log_history if "eval_loss" in h]
    assert losses.index(max(losses)) == 0
    best = load_adapter(tmp_path / "checkpoint-2").tensors
    now = tensors(adapted)
    if name == "lora":
        assert all(same_bits(now[k], best[k]) for k in best)
        assert mine.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)
    else:  # without the reserves, which the last of its events removes
        assert all(same_bits(now[k], best[k][: now[k].shape[0]]) for k in best if k.endswith(".A"))
        assert max(len(v) for k, v in now.items() if k.endswith(".A")) < 3


def test_evaluation_has_no_masks_and_the_adapter(tmp_path: Path) -> None:
    adapted = subject("lora", dropout=0.5)
    mine = trainer(adapted, tmp_path, eval_dataset=rows(4), per_device_eval_batch_size=4)
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    adapted.model.eval()
    with torch.no_grad():
        expected, seen = adapted.model(input_ids=ids, labels=ids).loss.item(), logits(adapted.model, ids)
    assert mine.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(torch.as_tensor(mine.predict(rows(4)).predictions), seen, atol=1e-5)
    with adapted.disabled():
        assert abs(mine.evaluate()["eval_loss"] - expected) > 1e-3


def test_pushing_a_checkpoint_brings_the_adapter_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = trainer(attach(base(), get_method("lora", r=2)), tmp_path)
    pushed: list[list[str]] = []
    monkeypatch.setattr(
        transformers.Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(sorted(os.listdir(self.args.output_dir)))
    )
    mine._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert pushed == [["adapter.json", "adapter.safetensors"]]


# ---------------------------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("name", ["lora", "adalora", "increlora", "dora"])
def test_autocast_in_bf16_trains_alike_in_fp32_tensors(name: str, tmp_path: Path) -> None:
    """The first step's gradients are fp32's up to bf16's rounding."""
    seen = []
    for bf16 in (False, True):
        adapted = subject(name)
        watch = Watch(adapted)
        trainer(adapted, tmp_path, bf16=bf16, callbacks=[watch], max_grad_norm=0.0).train()
        assert all(p.tensor.dtype == torch.float32 for p in adapted.params())
        seen.append(torch.cat([g.flatten() for g in watch.seen[0].values()]))
    assert torch.cosine_similarity(seen[0], seen[1], 0) > 0.998
    assert not torch.equal(seen[0], seen[1])


def test_a_second_call_of_train_begins_anew(tmp_path: Path) -> None:
    adapted = attach(base(), get_method("adalora", r=4, target_r=2))
    mine = trainer(adapted, tmp_path)
    mine.train()
    mine.train()
    assert sum(int((b.delta.g != 0).sum()) for b in adapted.branches()) == 2 * len(adapted.branches())
    grown = trainer(attach(base(), get_method("increlora", init_r=1, target_r=2, add=1)), tmp_path)
    grown.train()
    with pytest.raises(Incompatible, match="only begins afresh"):
        grown.train()


def test_laplace_sees_the_trainers_data(tmp_path: Path) -> None:
    """Its posterior is fitted on the training items, and the run is as without it, the base's own dropout included."""
    plain = trainer(attached(base(attention_dropout=0.2), small("lora")), tmp_path, train_sampling_strategy="random")
    plain.train()
    adapted = attached(base(attention_dropout=0.2), small("laplace_lora"))
    trainer(adapted, tmp_path, train_sampling_strategy="random").train()
    expected = tensors(plain.adapted)
    found = tensors(adapted)
    assert all(same_bits(found[k], expected[k]) for k in expected)
    assert any(float(found[k].abs().max()) > 0 for k in found if k not in expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_the_data_loader_change_nothing(tmp_path: Path) -> None:
    ends = []
    for workers in (0, 2):
        mine = trainer(attached(base(), small("lora", dropout=0.2)), tmp_path, dataloader_num_workers=workers)
        mine.train()
        ends.append(tensors(mine.adapted))
    assert all(same_bits(ends[0][k], ends[1][k]) for k in ends[0])


# ----------------------------------------------------------------------------------------------------------------- refusals
class Around(transformers.Trainer):
    """Its loss goes around the head."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        return (hidden @ model.lm_head.weight.T).square().mean()


def test_a_site_without_a_gradient_is_named(tmp_path: Path) -> None:
    adapted = attach(base(), get_method("lora", r=2, sites=("attention", "lm_head")))
    with pytest.raises(Incompatible, match=r"2 parameters got no gradient in the first step \(lm_head\."):
        trainer(adapted, tmp_path, cls=adapter_trainer(Around)).train()


class Bypass(AdapterTrainerMixin, transformers.Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return transformers.Trainer.training_step(self, *args, **kwargs)


def test_a_trainer_that_steps_past_the_events_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="Bypass steps the optimizer before"):
        trainer(attach(base(), get_method("lora", r=2)), tmp_path, cls=Bypass).train()


class OwnLoop(transformers.Trainer):
    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


def test_a_loop_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=r"OwnLoop has a training loop of its own \(_inner_training_loop\)"):
        trainer(attach(base(), get_method("lora", r=2)), tmp_path, cls=adapter_trainer(OwnLoop))


def test_another_version_of_transformers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.Trainer, "_load_best_model")
    with pytest.raises(Incompatible, match=r"has no Trainer\._load_best_model, which lorakit stands on"):
        trainer(attach(base(), get_method("lora", r=2)), tmp_path)


def test_the_mixin_stands_first() -> None:
    with pytest.raises(Incompatible, match=r"write class Wrong\(AdapterTrainerMixin, Trainer\)"):
        type("Wrong", (transformers.Trainer, AdapterTrainerMixin), {})
    with pytest.raises(Incompatible, match=r"is no transformers\.Trainer"):
        type("Alone", (AdapterTrainerMixin,), {})(adapted=attach(base(), get_method("lora", r=2)))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"optim": "adafactor"}, "optim=adafactor would be passed over"),
        ({"optim_args": "x=1"}, "would be passed over"),
        ({"bf16_full_eval": True}, "casts the adapter for good"),
    ],
)
def test_arguments_that_cannot_be_honored(keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match=says):
        trainer(attach(base(), get_method("lora", r=2)), tmp_path, **keys)


def test_arguments_that_only_some_methods_can_honor(tmp_path: Path) -> None:
    trainer(attach(base(), get_method("lora", r=2)), tmp_path, optim="adamw_torch", adam_beta2=0.95)
    plus = get_method("loraplus", r=2)
    for keys in ({"optim": "adamw_torch"}, {"adam_beta2": 0.95}):
        with pytest.raises(Incompatible, match="passed over"):
            trainer(attach(base(), plus), tmp_path, **keys)
    with pytest.raises(Incompatible, match="auto_find_batch_size"):
        trainer(attached(base(), small("adalora")), tmp_path, auto_find_batch_size=True)
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(Incompatible, match="bf16=True"):
        Trained(adapted=attach(base(), plus), args=args)
    unnamed = get_method("lora", r=2).but(penalties=())
    with pytest.raises(NotExportable, match="save_strategy='no'"):
        trainer(attach(base(), unnamed), tmp_path, save_strategy="steps")


def test_adamws_own_arguments_are_the_trainers(tmp_path: Path) -> None:
    mine = trainer(attach(base(), get_method("lora", r=2)), tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1)
    (group,) = mine.create_optimizer().param_groups
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 1e-6, 0.1, 1e-2)


def test_what_contradicts_the_adapter(tmp_path: Path) -> None:
    def adapted() -> Adapted:
        return attach(base(), get_method("lora", r=2))

    args = arguments(tmp_path)
    with pytest.raises(BadParameter, match="model is not the one that is adapted"):
        Trained(base(), args, adapted=adapted(), train_dataset=rows())
    with pytest.raises(BadParameter, match="model_init cannot be used"):
        Trained(adapted=adapted(), args=args, model_init=base)
    one = adapted()
    with pytest.raises(BadParameter, match=r"give \(None, scheduler\)"):
        Trained(adapted=one, args=args, optimizers=(torch.optim.SGD(one.model.parameters(), lr=1.0), None))
    one.add("other", get_method("lora", r=2)).switch("default", "other")
    with pytest.raises(Incompatible, match="one adapter is trained at a time"):
        Trained(adapted=one, args=args)
    two = adapted()
    two.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(Incompatible, match=r"lm_head\.weight would train and is no adapter's"):
        Trained(adapted=two, args=args)
    three = adapted()
    Trained(three.model, args, adapted=three, train_dataset=rows()).train()


def test_a_schedule_that_does_not_fit_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    adapted = attach(base(), get_method("adalora", r=4, target_r=2, tinit=2, tfinal=2))
    before = tensors(adapted)
    with pytest.raises(BadParameter, match="leave no step of this run's 3"):
        trainer(adapted, tmp_path, max_steps=3).train()
    assert all(same_bits(before[k], v) for k, v in tensors(adapted).items())


# ------------------------------------------------------------------------------------------------------------ two processes
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from lorakit import attach, get_method
from tests.laws.subject import base
from tests.train.test_outside import OWN, trainer, uneven
name, out, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
first = {"increlora": {"init_r": 1}, "relora": {"r": 2, "dropout": 0.0}}.get(name, {"r": 2})
mine = trainer(attach(base(), get_method(name, **first | OWN[name])), out,
               uneven(32), max_steps=8, per_device_train_batch_size=size, save_strategy="steps", save_steps=4, max_grad_norm=0.3)
assert mine.accelerator.num_processes == 4 // size
if mine.accelerator.process_index:  # everybody begins where the first process does
    mine.adapted.params().rows[0].tensor.data.add_(1.0)
mine.train()
mine.save_model(str(out / "end"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adalora", "increlora", "relora", "sora"])
def test_two_processes_end_where_one_ends(name: str, tmp_path: Path) -> None:
    """Also where a parameter is exchanged for a larger one in the middle, which DistributedDataParallel would not see."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    finish(start([sys.executable, str(script), name, str(tmp_path / "one"), "4"], CUDA_VISIBLE_DEVICES=""))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--multi_gpu", "--main_process_port", str(20000 + os.getpid() % 20000), "--dynamo_backend", "no"]
    words = [*launch, str(script), name, str(tmp_path / "two"), "2"]
    finish(start(words, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""))
    one, two = (load_adapter(tmp_path / where / "end").tensors for where in ("one", "two"))
    assert one.keys() == two.keys()
    worst = max(float((one[k] - two[k]).abs().max()) for k in one if one[k].numel())
    assert worst < 2e-5
    assert json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
