"""DPO and KTO: ln 2 at the start for every silent method, the papers' and TRL's values, exact accumulation and resuming, and learning."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit import Adapted, get_method, list_methods
from lorakit.core.attach import attach
from lorakit.core.errors import BadParameter, DataError, Incompatible
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.preference import Rated, Ratings, collate_feedback, collate_preferences, tokenize_answers
from lorakit.data.samples import Samples
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.serve.open import open_adapter
from lorakit.serve.score import score
from lorakit.train import preference
from lorakit.train.config import TrainConfig
from lorakit.train.distributed import world
from lorakit.train.dry_run import dry_run
from lorakit.train.metrics import row_log_probs
from lorakit.train.preference import DPO, KTO, REFERENCE, Aim, Ratios
from lorakit.train.train import build, train
from tests.cli.typed import run
from tests.laws.subject import attached, awaken, base, provides, small
from tests.train.runs import config, model_folder, stopped
from tests.train.test_resume import adapter_bytes, steps_and_losses

TOKENIZER = tiny_tokenizer()
LN2 = torch.tensor(2.0).log().item()
PAIRS = [{"prompt": "say " * (1 + i % 3), "chosen": "yes it is" * (1 + i % 2), "rejected": "no " * (1 + i % 4)} for i in range(3)]
JUDGED = [{"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in PAIRS for k in ("chosen", "rejected")][:5]


def pairs() -> dict[str, Tensor]:
    return collate_preferences(tokenize_answers(TOKENIZER, PAIRS, max_length=64).samples, 0)


def feedback() -> dict[str, Tensor]:
    return collate_feedback(tokenize_answers(TOKENIZER, JUDGED, max_length=64).samples, 0)


def ratios(adapted: Adapted, step: int = 0) -> Ratios:
    return Ratios(adapted.model, adapted, lambda: adapted.given(step=step))


def mean(aim: Aim, adapted: Adapted, batch: Mapping[str, Any]) -> float:
    judged = aim(ratios(adapted), batch)
    assert judged.loss.item() == pytest.approx(judged.sums[0].item(), rel=1e-6)
    return aim.mean(judged.sums.tolist())


# --- the law: at step 0 the loss is ln 2 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list_methods())
def test_the_first_loss_is_ln_2(name: str, dtype: torch.dtype) -> None:
    check_start(name, dtype)


def check_start(name: str, dtype: torch.dtype = torch.float32) -> None:
    """Bit by bit with gradients, dropout and all; for a start that is a difference of equal parts, to rounding."""
    method = small(name, dropout=0.25)
    if not method.identity:
        pytest.skip("its recipe says that the output is another at init")
    for training in (False,) if method.patches else (True, False):  # a patch may act in training alone
        adapted = attached(base("llama", dtype, vocab_size=len(TOKENIZER)), method)
        adapted.model.train(training)
        for aim, batch, want in ((DPO(0.1), pairs(), LN2), (KTO(0.1, 1.0, 1.0), feedback(), 0.5)):
            got = mean(aim, adapted, batch)
            assert got == (pytest.approx(want, abs=1e-5) if "anchor" in provides(method) else want), (got - want, training)


def test_the_reference_sees_the_bases_own_dropout_and_no_adapters() -> None:
    """A base that drops by itself drops the same in both forwards, and afterwards the generators are where one forward leaves them."""
    check_dropout()


def check_dropout() -> None:
    adapted = attach(tiny_model("gpt2", vocab_size=len(TOKENIZER), resid_pdrop=0.2, attn_pdrop=0.2), get_method("lora", r=4, dropout=0.3))
    adapted.model.train()
    torch.manual_seed(0)
    assert mean(DPO(0.1), adapted, pairs()) == LN2
    after = torch.rand(3)
    torch.manual_seed(0)
    with adapted.given(step=0):
        row_log_probs(adapted.model, pairs())
    assert torch.equal(after, torch.rand(3))


def test_nothing_of_the_reference_has_a_gradient() -> None:
    adapted = awaken(attach(base(vocab_size=len(TOKENIZER)), get_method("lora", r=4)))
    before = [p.tensor.detach().clone() for p in adapted.params()]
    DPO(0.1)(ratios(adapted), pairs()).loss.backward()
    assert all(p.tensor.grad is not None for p in adapted.params())
    assert all(p.grad is None for n, p in adapted.model.named_parameters() if "lora" not in n)
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, adapted.params(), strict=True))
    assert adapted.active == ("default",)


# --- the values -------------------------------------------------------------------------------------------------------------------------


def whole_log_probs(model: Any, sample: Encoded) -> Tensor:
    """By the definition, one sequence at a time and in float64."""
    ids = torch.tensor([sample.input_ids])
    log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return sum((log_p[i, t] for i, t in enumerate(sample.labels[1:]) if t != IGNORED), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_oss"])
def test_log_probs_and_losses_are_the_papers(arch: str) -> None:
    check_values(arch)


def check_values(arch: str = "llama", beta: float = 0.3) -> None:
    adapted = awaken(attach(base(arch, vocab_size=len(TOKENIZER)), get_method("lora", r=4, sites="linear-modules")), size=0.2)
    samples = tokenize_answers(TOKENIZER, PAIRS, max_length=64).samples

    def r(sample: Encoded) -> Tensor:
        policy = whole_log_probs(adapted.model, sample)
        with adapted.disabled():
            return policy - whole_log_probs(adapted.model, sample).detach()

    found = ratios(adapted)(pairs())
    want = torch.stack([*(r(s.chosen) for s in samples), *(r(s.rejected) for s in samples)])
    assert torch.allclose(found.double(), want, atol=1e-4)
    loss = -F.logsigmoid(beta * (want[:3] - want[3:]))
    judged = DPO(beta)(ratios(adapted), pairs())
    assert judged.loss.item() == pytest.approx(loss.sum().item(), rel=1e-5)
    figures = DPO(beta).figures(judged.sums.tolist())
    assert figures["accuracy"] == (want[:3] > want[3:]).double().mean().item()
    assert figures["margin"] == pytest.approx(beta * (want[:3] - want[3:]).mean().item(), abs=1e-4)
    rated = tokenize_answers(TOKENIZER, JUDGED, max_length=64).samples
    z = torch.stack([r(s.mismatched) for s in rated]).mean().clamp_min(0)
    up, down = 1.5, 0.5
    aim = KTO(beta, up, down)
    judged = aim(ratios(adapted), feedback())
    assert judged.loss.item() == pytest.approx(_kto(rated, r, z, beta, up, down).item(), rel=1e-5)
    assert aim.figures(judged.sums.tolist())["kl"] == pytest.approx(z.item(), abs=1e-4)
    grads = torch.autograd.grad(judged.loss, [p.tensor for p in adapted.params()])
    wanted = torch.autograd.grad(_kto(rated, r, z.detach(), beta, up, down), [p.tensor for p in adapted.params()])
    assert all(torch.allclose(a, b, atol=1e-4 * b.abs().max().item() + 1e-7) for a, b in zip(grads, wanted, strict=True))


def _kto(rated: list[Rated], r: Callable[[Encoded], Tensor], z: Tensor, beta: float, up: float, down: float) -> Tensor:
    """Σ λ_y − v, as the paper writes it."""
    losses = [
        up * (1 - torch.sigmoid(beta * (r(s.answer) - z))) if s.desirable else down * (1 - torch.sigmoid(beta * (z - r(s.answer))))
        for s in rated
    ]
    return torch.stack(losses).sum()


def test_an_encoder_decoder_prefers_too() -> None:
    adapted = attach(base("t5", vocab_size=len(TOKENIZER)), get_method("lora", r=4))
    samples = tokenize_answers(TOKENIZER, PAIRS, max_length=64, encoder_decoder=True).samples
    batch = collate_preferences(samples, 0)
    assert mean(DPO(0.1), adapted, batch) == LN2
    awaken(adapted, size=0.3)
    labels = torch.tensor([samples[0].chosen.labels])
    logits = adapted.model(input_ids=torch.tensor([samples[0].chosen.input_ids]), labels=labels).logits
    want = logits.log_softmax(-1).gather(-1, labels[..., None]).sum()
    assert row_log_probs(adapted.model, batch)[0].item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_losses_rewards_and_gradients_are_trls(tmp_path: Path) -> None:
    """The real DPOTrainer and KTOTrainer on the same model, adapter and samples."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    from lorakit import load

    plain = tiny_tokenizer(chat_template=None)
    shared = {
        "output_dir": str(tmp_path), "report_to": "none", "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "max_length": 64,
    }  # fmt: skip

    def theirs(kind: Any, args: Any, rows: list[dict[str, Any]]) -> tuple[Any, list[Any], Tensor]:
        peft = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = tiny_model("llama", vocab_size=len(plain))
        trainer = kind(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=plain, peft_config=peft)
        with torch.no_grad():
            for i, (name, p) in enumerate(trainer.model.named_parameters()):
                if "lora_" in name:
                    p.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
        trainer.model.eval()
        items = [trainer.train_dataset[i] for i in range(len(rows))]
        loss = trainer._compute_loss(trainer.model, trainer.data_collator(items), False)
        loss.backward()
        return trainer, items, loss

    def same(trainer: Any, loss: Tensor, aim: Aim, batch: dict[str, Tensor]) -> None:
        trainer.model.save_pretrained(tmp_path / aim.name)
        ours = load(tiny_model("llama", vocab_size=len(plain)), tmp_path / aim.name)
        judged = aim(Ratios(ours.model, ours), batch)
        assert judged.loss.item() / judged.n == pytest.approx(loss.item(), abs=1e-6)
        figures, told = aim.figures(judged.sums.tolist()), {k: v[0] for k, v in trainer._metrics["eval"].items()}
        for mine, its in (("margin", "rewards/margins"), ("reward_chosen", "rewards/chosen"), ("reward_rejected", "rewards/rejected")):
            assert figures[mine] == pytest.approx(told[its], abs=1e-5)
        (judged.loss / judged.n).backward()
        grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        for row in ours.params():
            path, letter = row.name.rsplit(".", 1)
            (its,) = (g for name, g in grads.items() if f"{path}.lora_{letter}" in name)
            assert torch.allclose(row.tensor.grad, its, atol=1e-6), row.name  # type: ignore[arg-type]

    trainer, items, loss = theirs(DPOTrainer, DPOConfig(beta=0.3, per_device_train_batch_size=3, **shared), PAIRS)
    samples = tokenize_answers(plain, PAIRS, max_length=64).samples
    for item, pair in zip(items, samples, strict=True):
        assert item["prompt_ids"] + item["chosen_ids"] == pair.chosen.input_ids
        assert item["prompt_ids"] + item["rejected_ids"] == pair.rejected.input_ids
    same(trainer, loss, DPO(0.3), collate_preferences(samples, 0))

    args = KTOConfig(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, per_device_train_batch_size=5, **shared)
    trainer, items, loss = theirs(KTOTrainer, args, JUDGED)
    rated = [
        Rated(
            *(
                Encoded(item["prompt_ids"] + item[k], [IGNORED] * len(item["prompt_ids"]) + item[k]) if k else item["label"]
                for k in ("completion_ids", "", "KL_completion_ids")
            )
        )
        for item in items
    ]
    same(trainer, loss, KTO(0.3, 1.2, 0.7), collate_feedback(rated, 0))


# --- runs -------------------------------------------------------------------------------------------------------------------------------


def word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6)))


def preferred(path: Path, n: int = 60, seed: int = 0) -> str:
    """Answers are alike but for their end: chosen ones end in zz, rejected ones in qq."""
    rng = random.Random(seed)
    rows = [{"prompt": word(rng) + " ", "chosen": word(rng) + "zz", "rejected": word(rng) + "qq"} for _ in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def judged(path: Path, n: int = 60, seed: int = 0) -> str:
    """The same as feedback."""
    rng = random.Random(seed)
    rows = [{"prompt": word(rng) + " ", "completion": word(rng) + ("zz" if i % 2 else "qq"), "label": bool(i % 2)} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(tmp: Path, **keys: Any) -> TrainConfig:
    make = judged if keys.pop("kto", False) else preferred
    data = keys.pop("train_data", None) or make(tmp / "rows.jsonl")
    return config(tmp, **({"train_data": data, "per_device_train_batch_size": 4, "logging_steps": 1} | keys))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kto", [False, True], ids=["dpo", "kto"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_preferences_are_learned(tmp_path: Path, method: str, kto: bool) -> None:
    """Held-out pairs: the property that was planted is preferred after training, and it is not before."""
    keys = {"method": method, "kto": kto, "max_steps": 24, "learning_rate": 2e-2, "save_steps": 0, "eval_fraction": 0.3}
    result = train(settings(tmp_path, **keys), quiet=True)
    first = rows(tmp_path / "out")[0]
    assert first["loss"] == (0.5 if kto else LN2)
    assert (first["margin"], first["reward_chosen"], first["reward_rejected"], first["accuracy"]) == (0, 0, 0, 0)
    assert result.final["accuracy"] >= (0.75 if kto else 0.9)
    assert result.final["margin"] > 0.2
    assert result.final["reward_chosen"] > result.final["reward_rejected"]
    assert result.final["loss"] < 0.96 * first["loss"]


@pytest.mark.parametrize("kto", [False, True], ids=["dpo", "kto"])
def test_a_run_cut_in_two_ends_with_the_same_bytes(tmp_path: Path, kto: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"kto": kto, "dropout": 0.2, "logging_steps": 2, "max_steps": 5, "save_steps": 1, "num_train_epochs": 3.0}
    keys["train_data"] = (judged if kto else preferred)(tmp_path / "few.jsonl", 12)
    train(settings(tmp_path, output_dir=str(tmp_path / "whole"), **keys), quiet=True)
    cut = settings(tmp_path, output_dir=str(tmp_path / "cut"), **keys)
    stopped(cut, 3, monkeypatch)
    train(cut.model_copy(update={"resume": "auto"}), quiet=True)
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "cut")
    assert steps_and_losses(tmp_path / "whole") == steps_and_losses(tmp_path / "cut")
    told = [[(r["margin"], r["accuracy"]) for r in rows(tmp_path / name) if "margin" in r] for name in ("whole", "cut")]
    assert told[0] == told[1]


def test_checkpointing_and_accumulation_change_nothing(tmp_path: Path) -> None:
    found = {}
    for name, keys in {
        "plain": {"per_device_train_batch_size": 4},
        "checkpointing": {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }.items():
        out = tmp_path / name
        train(settings(tmp_path, output_dir=str(out), max_steps=3, group_by_length=False, save_steps=0, **keys), quiet=True)
        found[name] = [(row["loss"], row.get("margin")) for row in rows(out) if "loss" in row]
    assert found["checkpointing"] == found["plain"]
    for (a, b), (c, d) in zip(found["accumulated"], found["plain"], strict=True):
        assert a == pytest.approx(c, abs=2e-4)
        assert b == pytest.approx(d, abs=2e-3)
    assert found["accumulated"][0][0] == LN2


def test_a_row_tells_the_mean_over_its_window(tmp_path: Path) -> None:
    told = []
    for every in (1, 4):
        out = tmp_path / str(every)
        train(settings(tmp_path, output_dir=str(out), max_steps=4, logging_steps=every, save_steps=0), quiet=True)
        told.append([row["margin"] for row in rows(out) if "margin" in row])
    assert told[1] == [pytest.approx(sum(told[0]) / 4)]
    assert told[0][0] == 0 != told[0][-1]


def test_the_command_line_trains_and_scores(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    data, out = preferred(tmp_path / "prefs.jsonl"), tmp_path / "out"
    words = ["train", "--model", str(tmp_path / "model"), "--train-data", data, "--output-dir", str(out), "--method", "lora"]
    said = run(*words, "--max-steps", "20", "--learning-rate", "2e-2", "--beta", "0.2", "--quiet")
    assert "eval margin" in said
    found = json.loads(run("eval", str(out / "adapter"), "--data", data, "--json"))
    final = json.loads((out / "result.json").read_text())["final"]
    assert found == pytest.approx(final, abs=1e-5)  # with the beta that it was trained with
    assert found["accuracy"] > 0.8
    assert json.loads(run("eval", "base", "--model", str(tmp_path / "model"), "--data", data, "--json"))["loss"] == LN2
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "some text {i}"}}\n' for i in range(20)))
    assert "perplexity" in run("eval", str(out / "adapter"), "--data", str(texts))
    assert "on which only `lorakit eval` of one adapter" in run("eval", str(out / "adapter"), "--data", data, "--posterior", code=2)


def test_an_adapter_that_goes_on_is_its_own_reference(tmp_path: Path) -> None:
    """SFT, then DPO on top: the reference is what the run began with, and so it is for eval."""
    train(config(tmp_path, output_dir=str(tmp_path / "sft"), learning_rate=5e-2), quiet=True)
    keys = {"init_adapter": str(tmp_path / "sft" / "adapter"), "max_steps": 8, "learning_rate": 2e-2, "save_steps": 0, "method": "lora"}
    made = settings(tmp_path, **keys)
    result = train(made, quiet=True)
    assert rows(tmp_path / "out")[0]["loss"] == LN2
    opened = open_adapter(tmp_path / "out" / "adapter")
    assert score(opened, str(made.train_data)) == pytest.approx(result.final, abs=1e-5)
    assert opened.adapted is not None
    assert REFERENCE in opened.adapted.methods
    assert opened.adapted.active == ("default",)
    (tmp_path / "sft").rename(tmp_path / "gone")
    with pytest.raises(DataError, match="not there any more"):
        score(open_adapter(tmp_path / "out" / "adapter"), str(made.train_data))


def test_what_has_no_meaning_is_refused_before_it_starts(tmp_path: Path) -> None:
    for keys, error, match in (
        ({"method": "hiddenkey"}, Incompatible, "hiddenkey makes its loss of predicted tokens or classes itself"),
        ({"method": "laplace_lora"}, Incompatible, "fits a posterior"),
        ({"kto": True, "per_device_train_batch_size": 1}, BadParameter, "one sample says nothing"),
        ({"kto": True, "desirable_weight": 0, "undesirable_weight": 0}, BadParameter, "nothing would be learned"),
        ({"task": "causal-lm"}, DataError, "task"),
    ):
        with pytest.raises(error, match=match):
            build(settings(tmp_path, **keys), world())
    build(settings(tmp_path, method="hiddenkey", kl=0.0), world())


def test_weights_far_from_the_papers_are_noted(tmp_path: Path) -> None:
    def of(*wanted: bool) -> Ratings:
        return Ratings(Samples.of([Encoded([1], [1], mark=int(one)) for one in wanted], "token"), 8)

    items = of(*[True] * 2, *[False] * 8)
    (note,) = KTO(0.1, 1.0, 1.0).notes(items)
    assert "2 desirable answers weigh 0.25 times as much as 8" in note
    assert "from 4 to 5.33" in note
    assert KTO(0.1, 4.5, 1.0).notes(items) == []
    for kto, some, said in (
        (
            KTO(0.1, 1.0, 1.0),
            of(True, True),
            "2 are desirable, and only desirable ones have a weight: KTO makes them all more likely",
        ),
        (
            KTO(0.1, 1.0, 1.0),
            of(*[False] * 8),
            "only undesirable ones have a weight: KTO makes them all less likely",
        ),
        (KTO(0.1, 1.0, 0.0), items, "only desirable ones have a weight"),
    ):
        (note,) = kto.notes(some)
        assert said in note and note.endswith("KTO needs both kinds to tell them apart")
    assert DPO(0.1).notes(items) == []
    assert build(settings(tmp_path, kto=True), world()).adapted.notes == []


def test_a_dry_run_counts_both_halves(tmp_path: Path) -> None:
    assert dry_run(settings(tmp_path)).memory.total > 0
    assert dry_run(settings(tmp_path, kto=True)).memory.total > 0


@pytest.mark.parametrize("method", ["lora_ga", "bilora", "dfo_lora", "adalora", "relora", "inflora", "eva"])
def test_calibrated_methods_and_loops_take_preferences(tmp_path: Path, method: str) -> None:
    more = {"population": 4, "d": 16} if method == "dfo_lora" else {}
    result = train(settings(tmp_path, method=method, max_steps=4, save_steps=0, **more), quiet=True)
    assert result.final["loss"] == pytest.approx(LN2, abs=0.5)


def test_calibration_sees_the_first_steps_gradient() -> None:
    """At the start π = π_ref: the gradient of the loss that an init sees is that of the first step."""
    adapted = attach(base(vocab_size=len(TOKENIZER)), get_method("lora", r=4))
    tensors = [p.tensor for p in adapted.params()]
    for aim, batch in ((DPO(0.3), pairs()), (KTO(0.3, 1.0, 0.5), feedback())):
        first = torch.autograd.grad(aim(ratios(adapted), batch).loss, tensors)
        seen = torch.autograd.grad(aim.on(adapted.model, batch)[0], tensors)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, seen, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_methods())
def test_every_method_takes_a_step_of_dpo(tmp_path: Path, name: str) -> None:
    made = settings(tmp_path, method=name, max_steps=6, save_steps=0)
    if name in ("hiddenkey", "laplace_lora"):
        with pytest.raises(Incompatible):
            train(made, quiet=True)
        return
    assert train(made, quiet=True).final["loss"] < 2


@pytest.mark.slow
def test_a_quantized_base_and_tasks_in_sequence(tmp_path: Path) -> None:
    train(settings(tmp_path, quantize="nf4", output_dir=str(tmp_path / "nf4"), max_steps=2), quiet=True)
    assert rows(tmp_path / "nf4")[0]["loss"] == LN2
    two = [preferred(tmp_path / "a.jsonl", seed=1), preferred(tmp_path / "b.jsonl", seed=2)]
    result = train(settings(tmp_path, train_data=two, max_steps=6, output_dir=str(tmp_path / "two")), quiet=True)
    assert [len(seen) for seen in result.tasks] == [1, 2]
    assert {"accuracy", "margin", "forgetting"} <= set(result.final)


def _an_adapter_stays_on(m: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    m.setattr(preference, "aside", lambda adapted: nullcontext())


def _other_dropout(m: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    real = torch.random.fork_rng
    m.setattr(torch.random, "fork_rng", lambda *args, **more: real(**more) if more else nullcontext())


def _prompts_count(m: pytest.MonkeyPatch) -> None:
    real = row_log_probs
    m.setattr(preference, "row_log_probs", lambda model, batch: real(model, {**batch, "labels": batch["input_ids"]}))


@pytest.mark.parametrize(
    ("change", "check"),
    [(_an_adapter_stays_on, check_values), (_other_dropout, check_dropout), (_prompts_count, check_values)],
)
def test_mutants_are_seen(change: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check()
