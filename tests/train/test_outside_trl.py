"""Methods under TRL's SFTTrainer and DPOTrainer: a method's parts take effect there, the fused head's loss is the model's own, and the
reference of DPO is the adapter-off model, in the same memory."""

import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

from lorakit import Adapted, Incompatible, adapter_trainer, attach, get_method, list_methods, load
from lorakit.adapters.io import load_adapter
from lorakit.cli.main import app
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.train.outside import Reference
from tests.laws.subject import awaken, logits, same_bits, small
from tests.test_readme import blocks
from tests.train.test_outside import Watch, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry
    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()


def base() -> transformers.PreTrainedModel:
    return tiny_model("llama", vocab_size=len(tiny_tokenizer()))


def attached(name: str, **keys: Any) -> Adapted:
    ids = [torch.randint(8, 120, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return attach(base(), small(name, **keys), calibration=[{"input_ids": x, "labels": x} for x in ids])


def settings(out: Path, **keys: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [],
        "save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "dataloader_pin_memory": False, "activation_checkpointing": False, "log_level": "error",
    }  # fmt: skip
    return common | keys


def texts() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"text": f"line {i} " + "abc de " * (1 + i % 5)} for i in range(16)])


def pairs() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": f"say {i}", "chosen": " yes" * (1 + i % 3), "rejected": " no" * (1 + i % 4)} for i in range(16)]
    )


def sft(adapted: Adapted, out: Path, **keys: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    more = {k: keys.pop(k) for k in ("callbacks", "eval_dataset") if k in keys}
    args = SFTConfig(**settings(out, **keys))
    return adapter_trainer(SFTTrainer)(adapted=adapted, args=args, train_dataset=texts(), processing_class=tiny_tokenizer(), **more)


def dpo(adapted: Adapted, out: Path, **keys: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    more = {k: keys.pop(k) for k in ("callbacks", "ref_model", "eval_dataset") if k in keys}
    args = DPOConfig(**settings(out, **keys))
    return adapter_trainer(DPOTrainer)(adapted=adapted, args=args, train_dataset=pairs(), processing_class=tiny_tokenizer(), **more)


def losses(mine: Any) -> list[float]:
    return [h["loss"] for h in mine.state.log_history if "loss" in h]


def folder_of(mine: Any, out: Path) -> Path:
    mine.save_model(str(out / "saved"))
    names = {p.name for p in (out / "saved").iterdir()}
    assert names == {"adapter.json", "adapter.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    return out / "saved"


# --------------------------------------------------------------------------------------------------------------------- SFT
REFUSED = {"bilora", "dfo_lora", "hiddenkey"}
NAMES = [n for n in list_methods() if n not in REFUSED]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("lora", "adalora", "prompt_tuning") else [pytest.mark.slow]) for n in NAMES]
)
def test_sft_sees_the_methods_own_loss_and_trains_it(name: str, tmp_path: Path) -> None:
    """TRL's head computes log-probabilities from the weight itself: that is the loss of the adapted model, patches and all."""
    adapted = awaken(attached(name))
    mine = sft(adapted, tmp_path)
    batch = mine._prepare_inputs(next(iter(mine.get_train_dataloader())))
    adapted.model.eval()
    with torch.no_grad():
        assert mine.compute_loss(adapted.model, dict(batch)).item() == pytest.approx(adapted.model(**batch).loss.item(), abs=1e-5)
    mine.train()
    again = load(base(), folder_of(mine, tmp_path))
    ids = batch["input_ids"]
    assert same_bits(logits(again.model, ids), logits(adapted.model, ids))
    assert again.meta["chat_template"] == tiny_tokenizer().chat_template
    assert mine.state.global_step == 4


@pytest.mark.parametrize(
    "keys",
    [
        {"packing": True, "max_length": 32},
        {"bf16": True, "activation_checkpointing": True},
        {"gradient_accumulation_steps": 3},
        {"assistant_only_loss": False, "activation_checkpointing": True, "lr_scheduler_type": "cosine"},
    ],
    ids=["packing", "bf16", "accumulation", "checkpointing"],
)
def test_adalora_in_sft_reaches_its_budget(keys: dict[str, Any], tmp_path: Path) -> None:
    adapted = attach(base(), get_method("adalora", r=4, target_r=2, tfinal=2))
    mine = sft(adapted, tmp_path, **({"max_steps": 6} | keys))
    mine.train()
    gates = [b.delta.g for b in adapted.branches()]
    assert sum(int((g != 0).sum()) for g in gates) == 2 * len(gates)
    assert all(p.tensor.dtype == torch.float32 for p in adapted.params())
    assert all(math.isfinite(x) for x in losses(mine))


def test_the_penalty_is_in_sfts_gradient(tmp_path: Path) -> None:
    """The same run with and without it: the first gradient differs by exactly the penalty's."""
    seen = []
    for orth in (0.5, 0.0):
        adapted = awaken(attach(base(), get_method("adalora", r=4, target_r=2, orth=orth)))
        watch = Watch(adapted)
        sft(adapted, tmp_path, callbacks=[watch], max_grad_norm=0.0, gradient_accumulation_steps=2).train()
        seen.append(watch.seen[0])
    twin = awaken(attach(base(), get_method("adalora", r=4, target_r=2, orth=0.5)))
    (penalty,) = twin.methods["default"].penalties
    penalty(twin, twin.context).backward()
    for p in twin.params():
        expected = torch.zeros_like(p.tensor) if p.tensor.grad is None else p.tensor.grad
        assert torch.allclose(seen[0][p.name] - seen[1][p.name], expected, atol=1e-6), p.name


def test_an_adapter_at_the_head_is_refused_where_trl_goes_around_it(tmp_path: Path) -> None:
    adapted = attach(base(), get_method("lora", r=2, sites=("attention", "lm_head")))
    with pytest.raises(Incompatible, match="multiplies by the head's weight itself"):
        sft(adapted, tmp_path)


def test_trl_does_not_cast_what_trains_on_a_quantized_base(tmp_path: Path) -> None:
    """It would make it bf16, and Trainer would not take the model at all: for both, nothing but PEFT trains on such a base."""
    adapted = attach(base(), get_method("lora", r=2))
    before = tensors(adapted)
    for name, value in {"is_quantized": True, "is_loaded_in_4bit": True}.items():
        setattr(adapted.model, name, value)
    adapted.model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    mine = sft(adapted, tmp_path)
    assert all(same_bits(v, before[k]) for k, v in tensors(adapted).items())
    assert not getattr(adapted.model, "_hf_peft_config_loaded", False)
    mine.train()


@pytest.mark.parametrize("name", ["lora", "relora"])
def test_sft_resumes_with_the_same_bits(name: str, tmp_path: Path) -> None:
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", "shuffle_dataset": True}
    known = {"lora": {"r": 2, "dropout": 0.2}, "relora": {"r": 2, "period": 2, "warmup": 1}}[name]
    whole = sft(attach(base(), get_method(name, **known)), tmp_path / "whole", **keys)
    whole.train()
    again = sft(attach(base(), get_method(name, **known)), tmp_path / "again", **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = tensors(whole.adapted)
    assert all(same_bits(v, expected[k]) for k, v in tensors(again.adapted).items())


# --------------------------------------------------------------------------------------------------------------------- DPO
@pytest.mark.parametrize(
    "keys",
    [{}, {"precompute_ref_log_probs": True}, {"bf16": True, "activation_checkpointing": True}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "precomputed", "bf16", "accumulation"],
)
@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_dpos_reference_is_the_adapter_off_model(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    """At step 0 the loss is ln 2 to the last bit, and afterwards it falls; no second base is in memory, and nothing is loaded."""
    adapted = attached(name)
    mine = dpo(adapted, tmp_path, **keys)
    assert isinstance(mine.ref_model, Reference)
    assert not list(mine.ref_model.parameters())
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    mine.train()
    found = losses(mine)
    assert found[0] == torch.tensor(math.log(2)).item()
    assert found[-1] < found[0]
    assert all(same_bits(p, before[n]) for n, p in adapted.model.named_parameters() if n in before)
    assert load_adapter(folder_of(mine, tmp_path)).recipe.name == name


def test_dpos_reference_stays_where_it_was(tmp_path: Path) -> None:
    """Its log-probabilities with a trained adapter are those of the base alone, also in evaluation, and the policy's are others."""
    adapted = attached("lora")
    mine = dpo(adapted, tmp_path, eval_dataset=pairs().select(range(4)))
    batch = mine._prepare_inputs(next(iter(mine.get_train_dataloader())))
    with torch.no_grad():
        first = mine.compute_ref_log_probs(mine.ref_model, batch)
    mine.train()
    with torch.no_grad():
        last = mine.compute_ref_log_probs(mine.ref_model, batch)
        policy = mine.compute_ref_log_probs(adapted.model, batch)
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert all(float((a - b).abs().max()) > 0.1 for a, b in zip(policy, last, strict=True))
    assert mine.evaluate()["eval_rewards/margins"] > 0
    assert adapted.active == ("default",)


def test_dpos_gradient_is_that_of_a_copied_reference(tmp_path: Path) -> None:
    """With a second base, as TRL would have made one: the same adapter in the end."""
    ends: list[dict[str, Tensor]] = []
    for copy in (None, base()):
        mine = dpo(attached("lora"), tmp_path, **({} if copy is None else {"ref_model": copy}))
        assert isinstance(mine.ref_model, Reference) == (copy is None)
        mine.train()
        ends.append(tensors(mine.adapted))
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-6) for k in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("laplace_lora", "relora", "lora", "adalora")])
def test_every_method_under_dpo(name: str, tmp_path: Path) -> None:
    adapted = attached(name)
    mine = dpo(adapted, tmp_path)
    mine.train()
    found = losses(mine)
    if adapted.methods["default"].identity and name != "longlora":  # in training it sees shorter contexts
        assert found[0] == pytest.approx(math.log(2), abs=5e-4 if name == "vb_lora" else 1e-5)
    assert min(found[1:]) < found[0]
    folder_of(mine, tmp_path)


def test_relora_needs_its_legs_outside_of_the_base(tmp_path: Path) -> None:
    """The reference needs the bare base between a step's forward and its backward."""
    known = {"r": 2, "period": 2, "warmup": 1}
    with pytest.raises(Incompatible, match=r"set absorb=False or precompute_ref_log_probs=True"):
        dpo(attach(base(), get_method("relora", **known)), tmp_path)
    for absorb, keys in ((False, {}), (True, {"precompute_ref_log_probs": True})):
        mine = dpo(attach(base(), get_method("relora", absorb=absorb, **known)), tmp_path, **keys)
        mine.train()
        assert losses(mine)[0] == torch.tensor(math.log(2)).item()


def test_what_looks_at_labels_is_refused_before_the_first_step(tmp_path: Path) -> None:
    mine = dpo(attached("laplace_lora"), tmp_path)
    with pytest.raises(Incompatible, match="the Trainer's have no labels"):
        mine.train()
    assert mine.state.global_step == 0


def test_a_moving_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="sync_ref_model=True moves the reference"):
        dpo(attached("lora"), tmp_path, sync_ref_model=True)


def test_dpo_resumes_with_the_same_bits(tmp_path: Path) -> None:
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = dpo(attached("increlora", target_r=2), tmp_path / "whole", **keys)
    whole.train()
    again = dpo(attached("increlora", target_r=2), tmp_path / "again", **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = tensors(whole.adapted)
    assert all(same_bits(v, expected[k]) for k, v in tensors(again.adapted).items())


def test_kto_has_the_same_reference(tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": f"say {i}", "completion": " yes" * (1 + i % 3), "label": bool(i % 2)} for i in range(16)]
    args = KTOConfig(**settings(tmp_path))
    mine = adapter_trainer(KTOTrainer)(
        adapted=attached("lora"), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    mine.train()
    assert isinstance(mine.ref_model, Reference)
    assert losses(mine)[0] == pytest.approx(0.5, abs=1e-6)


# --------------------------------------------------------------------------------------------------------- docs/outside.md
PAGE = (Path(__file__).parents[2] / "docs" / "outside.md").read_text(encoding="utf-8")


def test_every_block_of_the_page_is_marked() -> None:
    assert len(re.findall(r"^```(?:bash|python)$", PAGE, flags=re.MULTILINE)) == len(blocks(PAGE)) == 4


def test_the_page_names_what_is_refused() -> None:
    from tests.train.test_outside import REFUSED as by_name

    assert all(f"`{name}`" in PAGE for name in by_name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(PAGE):
        if block.language == "python":
            exec(compile(block.code, "docs/outside.md", "exec"), {"__name__": "__main__"})
        else:
            words = shlex.split(block.code)[1:]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (words, result.output, result.exception)
    assert load_adapter(tmp_path / "out/sft/adapter").recipe.name == "adalora"
