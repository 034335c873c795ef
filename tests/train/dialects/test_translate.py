"""Configurations in other words: recognized, translated with a note, refused where something else would be learned."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import BadParameter, LorakitError
from lorakit.core.method import describe
from lorakit.train.chat_templates import TEMPLATES
from lorakit.train.config import FIELDS, Resolved, TrainConfig, resolve_config
from lorakit.train.dialects.rule import Joint, Only, To, plain
from lorakit.train.dialects.translate import DIALECTS, recognize
from lorakit.train.rows import read_rows

FACTORY: dict[str, Any] = {
    "model_name_or_path": "bundled", "stage": "sft", "do_train": True, "finetuning_type": "lora", "dataset": "rows.jsonl",
    "output_dir": "out",
}  # fmt: skip
AXOLOTL: dict[str, Any] = {
    "base_model": "bundled", "datasets": [{"path": "rows.jsonl", "type": "completion"}], "adapter": "lora", "lora_r": 16, "lora_alpha": 32,
    "learning_rate": "2e-4", "micro_batch_size": 2, "gradient_accumulation_steps": 4,
}  # fmt: skip
TRL: dict[str, Any] = {"model_name_or_path": "bundled", "dataset_name": "rows.jsonl", "use_peft": True}


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "more.jsonl"):
        Path(name).write_text(json.dumps({"text": "some words"}) + "\n")
    return tmp_path


def read(file: dict[str, Any], **flags: Any) -> Resolved:
    return resolve_config(file, flags)


def config(file: dict[str, Any], **flags: Any) -> TrainConfig:
    return read(file, **flags).config


def says(resolved: Resolved, *parts: str) -> None:
    text = "\n".join(resolved.notes)
    for part in parts:
        assert part in text, text


def test_every_rule_leads_to_a_key_of_ours() -> None:
    known = {*FIELDS, *(name for method in ("lora", "loraplus", "pissa", "qlora") for name in describe(method).parameters)}
    for dialect in DIALECTS:
        assert dialect.marks <= dialect.keys.keys()
        for key, rule in dialect.keys.items():
            if isinstance(rule, To | Joint):
                assert set(rule.ours.split()) <= known, (dialect.name, key)
        assert dialect.defaults.keys() <= set(FIELDS)


def test_each_dialect_is_recognized_by_its_marks() -> None:
    assert [d.name if (d := recognize(file)) else None for file in (FACTORY, AXOLOTL, TRL, {"model": "x", "r": 8})] == [
        "llama_factory", "axolotl", "trl", None,
    ]  # fmt: skip
    mixture = {"model_name_or_path": "m", "use_peft": True, "datasets": [{"path": "x"}]}
    assert recognize(mixture).name == "trl", "its mixture of data sets has axolotl's name"  # type: ignore[union-attr]
    says(read(FACTORY), "a configuration of LLaMA-Factory, by dataset, finetuning_type, stage")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (FACTORY | {"base_model": "x"}, "'dataset' is LLaMA-Factory's and 'base_model' is axolotl's"),
        (FACTORY | {"lora_r": 8}, "'lora_r' is axolotl's key in a configuration of LLaMA-Factory; use 'lora_rank'"),
        (AXOLOTL | {"cutoff_len": 8}, "use 'sequence_len'"),
        (TRL | {"lora_rank": 8}, "use 'lora_r'"),
        (FACTORY | {"lora_rank": 8, "r": 16}, "lora_rank is r here, and both are given"),
        (FACTORY | {"lora_rnk": 8}, "unknown key 'lora_rnk'.*'lora_rank' .LLaMA-Factory's"),
    ],
)
def test_mixed_words_are_errors(file: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        config(file)


# -- what a dialect does where nothing is said ------------------------------------------------------------------------------


def test_llama_factory_learns_as_it_does() -> None:
    got = config(FACTORY)
    assert got.method == "lora" and got.method_args == {"r": 8, "alpha": 16.0, "dropout": 0.0, "sites": "all-linear"}
    assert (got.learning_rate, got.num_train_epochs, got.lr_scheduler_type, got.max_length, got.seed) == (5e-5, 3.0, "linear", 2048, 42)
    assert (got.packing, got.group_by_length, got.dtype) == (False, False, "float32")
    says(read(FACTORY), "left out, so as in LLaMA-Factory: ", "learning_rate 5e-05", "alpha 16")
    assert config(FACTORY | {"lora_rank": 32}).method_args["alpha"] == 64.0, "alpha is twice the rank"
    assert config(FACTORY, r=4).method_args["alpha"] == 8.0, "whoever says the rank"
    assert config(FACTORY | {"lora_alpha": 3}).method_args["alpha"] == 3
    text = config(FACTORY | {"stage": "pt"})
    assert text.packing and "packing" not in text.model_fields_set, "where it cannot be exact, samples are padded"


def test_axolotl_learns_as_it_does() -> None:
    got = config(AXOLOTL)
    assert got.method_args == {"r": 16, "alpha": 32, "dropout": 0.0, "sites": ["q_proj", "v_proj"]}, "PEFT's default modules of llama"
    assert (got.learning_rate, got.num_train_epochs, got.lr_scheduler_type, got.max_length, got.seed) == (2e-4, 1.0, "cosine", 512, 42)
    assert (got.packing, got.warmup_ratio, got.per_device_eval_batch_size) == (False, 0.03, 2)
    says(read(AXOLOTL), "warm-up is 3 % of the steps; axolotl's ends after 100 of them")
    assert "warm-up" not in "".join(read(AXOLOTL | {"warmup_steps": 10}).notes) + "".join(read(AXOLOTL, warmup_steps=10).notes)
    for left_out, message in (
        ("adapter", "add adapter: lora"),
        ("lora_alpha", "no default of lora_alpha"),
        ("learning_rate", "learning_rate: 2e-4"),
    ):
        with pytest.raises(BadParameter, match=message):
            config({key: value for key, value in AXOLOTL.items() if key != left_out})


def test_trl_learns_as_it_does() -> None:
    got = config(TRL)
    assert got.method_args == {"r": 16, "alpha": 32.0, "dropout": 0.05, "sites": ["q_proj", "v_proj"]}
    assert (got.learning_rate, got.num_train_epochs, got.lr_scheduler_type, got.max_length, got.seed) == (2e-5, 3.0, "linear", 1024, 42)
    assert (got.packing, got.train_on) == (False, "all"), "assistant_only_loss is false there"
    dpo = config(TRL | {"beta": 0.3})
    assert (dpo.task, dpo.beta, dpo.learning_rate) == ("dpo", 0.3, 1e-6)
    assert config(TRL, task="kto").learning_rate == 1e-6
    with pytest.raises(BadParameter, match="add use_peft: true"):
        config({"model_name_or_path": "bundled", "dataset_name": "rows.jsonl"})


def test_trl_defaults_are_those_of_the_real_package() -> None:
    trl = pytest.importorskip("trl")
    import dataclasses

    def default(cls: Any, name: str) -> Any:
        return next(f.default for f in dataclasses.fields(cls) if f.name == name)

    ours = {d.name: d for d in DIALECTS}["trl"].defaults
    for name in ("num_train_epochs", "lr_scheduler_type", "seed", "max_length", "packing"):
        assert default(trl.SFTConfig, name) == ours[name], name
    assert (default(trl.SFTConfig, "learning_rate"), default(trl.DPOConfig, "learning_rate")) == (2e-5, 1e-6)
    assert default(trl.KTOConfig, "learning_rate") == 1e-6
    assert [default(trl.ModelConfig, f"lora_{name}") for name in ("r", "alpha", "dropout")] == [16, 32, 0.05]
    known = {d.name: d for d in DIALECTS}["trl"].keys
    for cls in (trl.SFTConfig, trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments):
        own = {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(__import__("transformers").TrainingArguments)}
        assert own <= known.keys() | set(FIELDS), own - known.keys() - set(FIELDS)


def test_trl_trains_completions_of_pairs_and_all_of_chats() -> None:
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    pairs = TRL | {"dataset_name": "pairs.jsonl"}
    assert config(pairs).train_on == "assistant"
    assert config(pairs | {"completion_only_loss": False}).train_on == "all"
    assert config(TRL | {"assistant_only_loss": True}).train_on == "assistant"
    assert config(TRL, train_on="last").train_on == "last"


# -- methods, precision, sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "keys", "method", "args"),
    [
        (FACTORY, {"use_dora": True}, "dora", {}),
        (FACTORY, {"use_rslora": "True", "use_dora": True}, "rslora+dora", {}),
        (FACTORY, {"pissa_init": True}, "pissa", {"niter": 16}),
        (FACTORY, {"pissa_init": True, "pissa_iter": -1}, "pissa", {"niter": 0}),
        (FACTORY, {"loraplus_lr_ratio": 16.0}, "loraplus", {"ratio": 16.0}),
        (FACTORY, {"lora_target": "q_proj,v_proj"}, "lora", {"sites": ["q_proj", "v_proj"]}),
        (FACTORY, {"additional_target": "embed_tokens, lm_head"}, "lora", {"unfreeze": ["embed_tokens", "lm_head"]}),
        (AXOLOTL, {"peft_use_dora": True, "lora_target_linear": True}, "dora", {"sites": "all-linear"}),
        (AXOLOTL, {"peft_init_lora_weights": "pissa_niter_4"}, "pissa", {"niter": 4}),
        (AXOLOTL, {"lora_modules_to_save": ["lm_head"]}, "lora", {"unfreeze": ["lm_head"]}),
        (TRL, {"use_rslora": True, "lora_target_modules": "all-linear"}, "rslora", {"sites": "all-linear"}),
        (TRL, {"lora_target_modules": r".*layers\.0.*q_proj"}, "lora", {"sites": r"re:.*layers\.0.*q_proj"}),
        (TRL, {"load_in_4bit": True}, "qlora", {"double_quant": False}),
        (FACTORY, {"quantization_bit": 4, "double_quantization": False}, "qlora", {"double_quant": False}),
        (FACTORY, {"quantization_bit": 4, "double_quantization": False, "use_dora": True}, "qlora+dora", {"double_quant": False}),
        (TRL, {"load_in_4bit": True, "use_dora": True}, "qlora+dora", {"double_quant": False}),
    ],
)
def test_switches_choose_a_method(file: dict[str, Any], keys: dict[str, Any], method: str, args: dict[str, Any]) -> None:
    got = config(file | keys)
    assert got.method == method
    assert {name: got.method_args[name] for name in args} == args


def test_a_base_in_four_bits() -> None:
    for file in (FACTORY | {"quantization_bit": 4}, AXOLOTL | {"adapter": "qlora", "load_in_4bit": True}):
        assert (config(file).quantize, config(file).method) == ("nf4", "lora")
    assert config(TRL | {"load_in_4bit": True, "use_bnb_nested_quant": True}).quantize == "nf4"


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"bf16": True}, "bfloat16"),
        ({"bf16": "auto"}, "bfloat16"),
        ({"bf16": False}, "float32"),
        ({"fp16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_precision(keys: dict[str, Any], dtype: str) -> None:
    assert config(FACTORY | keys).dtype == config(TRL | keys).dtype == dtype
    assert config(AXOLOTL | keys).dtype == (dtype if "bf16" in keys else "bfloat16"), "its bf16 is auto"
    assert config(TRL | {"torch_dtype": "torch.bfloat16"}).dtype == "bfloat16"
    assert config(TRL | {"dtype": "float32", "bf16": True}).dtype == "float32"


def test_sizes_and_intervals() -> None:
    assert config(AXOLOTL).per_device_train_batch_size == 2
    whole = {key: value for key, value in AXOLOTL.items() if key != "gradient_accumulation_steps"} | {"batch_size": 8}
    assert config(whole).gradient_accumulation_steps == 4
    assert config(FACTORY | {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 50}).model_dump().items() >= {
        "save_steps": 0, "eval_steps": 50,
    }.items()  # fmt: skip
    assert config(FACTORY | {"warmup_steps": 0.1}).warmup_ratio == 0.1
    assert config(FACTORY | {"warmup_steps": 20}).warmup_steps == 20
    says(read(AXOLOTL | {"evals_per_epoch": 4}), "without effect: evals_per_epoch 4 (intervals are counted in steps: give eval_steps)")
    with pytest.raises(BadParameter, match="evaluations decide when to stop"):
        config(AXOLOTL | {"evals_per_epoch": 4, "early_stopping_patience": 3})
    assert config(FACTORY | {"report_to": ["wandb", "tensorboard"]}).report_to == "all"
    assert (
        config(AXOLOTL | {"wandb_project": "p", "wandb_name": "n"}).model_dump().items() >= {"report_to": "wandb", "run_name": "n"}.items()
    )
    assert config(FACTORY | {"resume_from_checkpoint": True}).resume == "auto"
    assert config(FACTORY | {"mask_history": True}).train_on == "last"
    assert config(FACTORY | {"learning_rate": "1.0e-4", "lora_rank": "16", "bf16": "true"}).model_dump()["learning_rate"] == 1e-4


REFUSED = [
    (FACTORY, "stage", "ppo", "choose sft, pt, dpo or kto"),
    (FACTORY, "stage", "rm", "choose sft, pt, dpo or kto"),
    (FACTORY, "finetuning_type", "full", "use lora, or another of lorakit list"),
    (FACTORY, "quantization_bit", 8, "quantize: nf4"),
    (FACTORY, "fp16", True, "use bf16: true"),
    (FACTORY, "pref_loss", "orpo", "DPO"),
    (FACTORY, "optim", "adafactor", "the optimizer is AdamW"),
    (FACTORY, "use_galore", True, "the optimizer is AdamW"),
    (FACTORY, "deepspeed", "ds_z3.json", "accelerate launch --use_fsdp"),
    (FACTORY, "shift_attn", True, "method: longlora"),
    (FACTORY, "neftune_noise_alpha", 5, "noise on embeddings"),
    (FACTORY, "val_size", 100, "a share can"),
    (FACTORY, "do_train", 1, "lorakit train trains"),
    (FACTORY, "adam_beta2", 0.95, "beta2 is 0.999"),
    (FACTORY, "resume_from_checkpoint", "out/checkpoint-3", "resume: auto"),
    (AXOLOTL, "load_in_8bit", True, "load_in_4bit: true"),
    (AXOLOTL, "rl", "orpo", "choose dpo or kto"),
    (AXOLOTL, "adapter", "llama-adapter", "choose lora or qlora"),
    (AXOLOTL, "optimizer", "lion_8bit", "the optimizer is AdamW"),
    (AXOLOTL, "relora", True, "method: relora"),
    (AXOLOTL, "special_tokens", {"eos_token": "<end>"}, "save a tokenizer with it"),
    (FACTORY, "export_dir", "merged", "lorakit merge ADAPTER --out FOLDER"),
    (AXOLOTL, "datasets", [{"path": "rows.jsonl", "type": "chatml.intel"}], "type chatml.intel is not read"),  # it asks for rl: dpo
    (TRL, "loss_type", "dft", "trained with nll"),
    (TRL, "loss_type", ["nll", "dft"], "trained with nll"),
    (TRL, "eos_token", "<|im_end|>", "save a tokenizer"),
    (TRL, "dataset_train_split", "train[:10%]", "save that split as a file"),
    (TRL, "torch_dtype", "float16", "use bfloat16"),
    (TRL, "lora_task_type", "SEQ_CLS", "the task follows from the rows"),
]


@pytest.mark.parametrize(("file", "key", "value", "message"), REFUSED, ids=[f"{key}-{value}" for _, key, value, _ in REFUSED])
def test_what_is_not_done_is_refused_with_what_to_type(file: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(BadParameter, match=message) as caught:
        config(file | {key: value})
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_switched_off_or_empty_is_not_spoken_of() -> None:
    quiet = read(AXOLOTL | {"wandb_project": None, "flash_attention": False, "load_in_8bit": False, "special_tokens": {}})
    assert not any("wandb" in note or "flash" in note for note in quiet.notes)
    says(read(AXOLOTL | {"flash_attention": True}), "without effect: flash_attention (attention is chosen by itself")
    says(read(AXOLOTL | {"optimizer": "adamw_8bit"}), "optimizer adamw_8bit (AdamW, with its state in fp32")


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_only_accepts_what_it_names(dialect: Any) -> None:
    """Every key that allows a few values takes those and refuses another."""
    file = {"llama_factory": FACTORY, "axolotl": AXOLOTL, "trl": TRL}[dialect.name]
    for key, rule in dialect.keys.items():
        if isinstance(rule, Only):
            for value in rule.values:
                config(file | {key: value})
            with pytest.raises(BadParameter, match=key):
                config(file | {key: "something else"})


# -- data -------------------------------------------------------------------------------------------------------------------


def info(entries: dict[str, Any]) -> None:
    Path("data").mkdir(exist_ok=True)
    Path("data/dataset_info.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("entry", "keys", "format", "columns"),
    [
        ({}, {}, "alpaca", {}),
        ({"columns": {"prompt": "q", "query": "input", "response": "a"}}, {}, "alpaca", {"instruction": "q", "output": "a"}),
        ({"formatting": "sharegpt"}, {}, "sharegpt", {}),
        ({"formatting": "sharegpt", "columns": {"messages": "talk"}}, {}, "sharegpt", {"conversations": "talk"}),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {"role_tag": "role", "content_tag": "content"}},
            {}, "chat", {},
        ),
        ({"formatting": "sharegpt", "tags": {"role_tag": "who", "content_tag": "said"}}, {}, "sharegpt",
         {"role": "who", "content": "said"}),
        ({"ranking": True, "columns": {"prompt": "instruction", "chosen": "good"}}, {"stage": "dpo"}, "preference", {"chosen": "good"}),
        ({"columns": {"prompt": "instruction", "kto_tag": "liked"}}, {"stage": "kto"}, "feedback", {"kto_tag": "liked"}),
        ({"columns": {"prompt": "body"}}, {"stage": "pt"}, "text", {"text": "body"}),
    ],
)  # fmt: skip
def test_dataset_info_becomes_format_and_columns(entry: dict[str, Any], keys: dict[str, Any], format: str, columns: dict[str, str]) -> None:
    info({"mine": {"file_name": "mine.json"} | entry})
    got = config(FACTORY | {"dataset": "mine"} | keys)
    assert (got.train_data, got.data_format, got.columns) == ("data/mine.json", format, columns)


def test_several_data_sets() -> None:
    info({"a": {"file_name": "a.json"}, "b": {"file_name": "b.json"}, "hub": {"hf_hub_url": "org/rows", "subset": "en"}})
    both = config(FACTORY | {"dataset": "a,b", "max_samples": 10})
    says(read(FACTORY | {"dataset": "a,b", "max_samples": 10}), "the first of the mixture; LLaMA-Factory takes 10 of each")
    assert both.train_data == {"data/a.json": 1.0, "data/b.json": 1.0} and both.mix_strategy == "passes" and both.max_train_samples == 20
    shares = config(FACTORY | {"dataset": "a,b", "mix_strategy": "interleave_under", "interleave_probs": "0.3,0.7"})
    assert shares.train_data == {"data/a.json": 0.3, "data/b.json": 0.7} and shares.mix_strategy == "under"
    assert config(FACTORY | {"dataset": "hub"}).train_data == "hf:org/rows:en"
    with pytest.raises(BadParameter, match=r"no data set is called 'aa'.*Did you mean 'a'"):
        config(FACTORY | {"dataset": "aa"})
    info({"a": {"file_name": "a.json", "num_samples": 10}})
    with pytest.raises(BadParameter, match="num_samples draws rows at random"):
        config(FACTORY | {"dataset": "a"})
    info({"a": {"file_name": "a.json", "columns": {"images": "images"}}})
    with pytest.raises(BadParameter, match="images, videos or audio"):
        config(FACTORY | {"dataset": "a"})


@pytest.mark.parametrize(
    ("entry", "format", "columns"),
    [
        ({"type": "completion", "field": "body"}, "text", {"text": "body"}),
        ({"type": "alpaca"}, "alpaca", {}),
        ({"type": "chat_template"}, "chat", {}),
        ({"type": "chat_template", "field_messages": "talk", "message_property_mappings": {"role": "who", "content": "said"}}, "chat",
         {"role": "who", "content": "said", "messages": "talk"}),
        ({"type": "chat_template", "field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}},
         "sharegpt", {}),
        ({"type": "sharegpt"}, "sharegpt", {}),
        ({"type": "chat_template.default", "field_chosen": "good"}, "preference", {"chosen": "good"}),
        ({"type": {"field_instruction": "q", "field_output": "a"}}, "alpaca", {"instruction": "q", "output": "a"}),
        ({}, "auto", {}),
    ],
)  # fmt: skip
def test_axolotl_types_become_format_and_columns(entry: dict[str, Any], format: str, columns: dict[str, str]) -> None:
    got = config(AXOLOTL | {"datasets": [{"path": "rows.jsonl"} | entry]})
    assert (got.train_data, got.data_format, got.columns) == ("rows.jsonl", format, columns)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "input_output"}, "type input_output is not read; use alpaca, chat_template or completion"),
        ({"type": {"format": "{instruction}"}}, "type.format is not done"),
        ({"type": "chat_template", "roles_to_train": ["user"]}, "roles_to_train"),
        ({"type": "chat_template", "train_on_eos": "all"}, "train_on_eos"),
        ({"type": "chat_template", "roles": {"user": ["customer"]}}, "rename it to user"),
        ({"split": "train[:5]"}, "save it as a file"),
        ({"shards": 4}, "shards is not read"),
        ({"typ": "alpaca"}, "Did you mean 'type'"),
    ],
)
def test_axolotl_types_that_are_not_read(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        config(AXOLOTL | {"datasets": [{"path": "rows.jsonl"} | entry]})


def test_what_is_held_out() -> None:
    nothing = config(FACTORY)
    assert (nothing.eval_data, nothing.max_eval_samples) == ("rows.jsonl", 100), "all rows are trained on, as there"
    says(read(FACTORY), "nothing is held out (as in LLaMA-Factory)")
    assert (config(FACTORY | {"val_size": 0.2}).eval_fraction, config(FACTORY | {"val_size": 0.2}).eval_data) == (0.2, None)
    assert config(AXOLOTL | {"val_set_size": 0.05}).eval_fraction == 0.05
    assert config(FACTORY | {"eval_dataset": "more.jsonl"}).eval_data == "more.jsonl"
    assert config(AXOLOTL | {"test_datasets": [{"path": "more.jsonl", "split": "train"}]}).eval_data == "more.jsonl"
    assert config(TRL, eval_fraction=0.3).eval_data is None


def test_a_held_out_source_is_read_as_the_other_one() -> None:
    other = {"file_name": "b.json", "columns": {"prompt": "ask"}}
    info({"a": {"file_name": "a.json"}, "b": other, "c": {"file_name": "c.json"}, "d": other | {"file_name": "d.json"}})
    assert config(FACTORY | {"dataset": "a", "eval_dataset": "c"}).eval_data == "data/c.json"
    got = config(FACTORY | {"dataset": "b", "eval_dataset": "d"})
    assert (got.eval_data, got.columns) == ("data/d.json", {"instruction": "ask"})
    for train, held in ("ab", "ba"):
        with pytest.raises(BadParameter, match="eval_dataset: its rows have another format or other columns"):
            config(FACTORY | {"dataset": train, "eval_dataset": held})
    with pytest.raises(BadParameter, match="test_datasets: its rows have another format"):
        config(AXOLOTL | {"test_datasets": [{"path": "more.jsonl", "type": "alpaca"}]})


@pytest.mark.parametrize("extra", [{"colums": {}}, {"columns": {"promt": "ask"}}, {"tags": {"rol_tag": "from"}}])
def test_a_word_of_dataset_info_that_nobody_knows_is_an_error(extra: dict[str, Any]) -> None:
    info({"a": {"file_name": "a.json"} | extra})
    with pytest.raises(BadParameter, match=r"dataset_info.json: a: .*is unknown\. Did you mean '(columns|prompt|role_tag)'"):
        config(FACTORY | {"dataset": "a"})


@pytest.mark.parametrize(
    "file",
    [
        FACTORY | {"adapter_name_or_path": "saved"},
        {key: value for key, value in AXOLOTL.items() if not key.startswith("lora")} | {"lora_model_dir": "saved"},
        TRL | {"init_adapter": "saved"},
    ],
)
def test_a_saved_adapter_keeps_its_own_parameters(file: dict[str, Any]) -> None:
    got = config(file)
    assert (got.init_adapter, got.method_args) == ("saved", {})


def test_templates(tmp_path: Path) -> None:
    own = read(FACTORY | {"template": "llama3"})
    assert own.config.chat_template is None
    says(own, "template llama3 (the tokenizer's own chat template is used)")
    named = config(AXOLOTL | {"chat_template": "chatml"}).chat_template
    assert named is not None and "<|im_start|>" in named, "axolotl puts it in the place of the tokenizer's"
    alpaca = config(AXOLOTL | {"datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}).chat_template
    assert alpaca is not None and "### Instruction:" in alpaca
    with pytest.raises(BadParameter, match="give one of chatml"):
        config(AXOLOTL | {"chat_template": "no_such"})
    bare = tmp_path / "model"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama"}')
    got = config(FACTORY | {"model_name_or_path": str(bare), "template": "qwen"}).chat_template
    assert got is not None and "<|im_start|>" in got


# -- flags and single aliases -----------------------------------------------------------------------------------------------


def test_flags_override_in_either_language() -> None:
    assert config(FACTORY | {"lora_rank": 8}, lora_rank=4).method_args["r"] == 4
    assert config(FACTORY | {"lora_rank": 8}, r=4).method_args["r"] == 4
    assert config({"model": "bundled", "r": 8}, lora_rank=4).method_args["r"] == 4
    assert config(FACTORY, use_dora=True).method == "dora"
    assert config(FACTORY, method="pissa").method == "pissa"
    assert config({}, **AXOLOTL).method_args["r"] == 16, "typed as flags alone"


def test_single_aliases_bring_no_defaults() -> None:
    got = read({"model": "bundled", "train_data": "rows.jsonl"}, lora_rank=4, micro_batch_size=3, lora_target="all")
    assert got.config.model_fields_set == {"model", "train_data", "per_device_train_batch_size", "method_args"}
    assert got.config.method_args == {"r": 4, "sites": "all-linear"}
    assert not any("left out" in note for note in got.notes)
    says(got, "lora_rank 4 -> r 4", "micro_batch_size 3 -> per_device_train_batch_size 3, as axolotl calls it")
    assert config({"model_name_or_path": "bundled"}).learning_rate == TrainConfig().learning_rate
    assert read({"model": "bundled", "r": 8}).notes == ()


@pytest.mark.parametrize(
    ("written", "read_as"),
    [("1e-4", 1e-4), ("8", 8), ("True", True), ("false", False), ("null", None), ("none", "none"), ("q_proj", "q_proj"), (3, 3)],
)
def test_scalars_in_quotes(written: Any, read_as: Any) -> None:
    assert plain(written) == read_as and type(plain(written)) is type(read_as)


ODD: list[Any] = [True, -1, 3.5, "x", [], [1], {"a": 1}, [{}], [{"path": 1}], 10**30, "1e999", float("nan"), [["a"]], {"a": [1]}]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_no_value_is_a_traceback(dialect: Any) -> None:
    """Every key of a dialect with values of every kind: understood, or one line."""
    file = {"llama_factory": FACTORY, "axolotl": AXOLOTL, "trl": TRL}[dialect.name]
    lines = []
    for key in dialect.keys:
        for value in ODD:
            try:
                config(file | {key: value})
            except LorakitError as error:
                lines.append(str(error))
    assert lines and not any("\n" in line for line in lines)


def test_no_entry_of_a_data_set_is_a_traceback() -> None:
    for key in ("file_name", "hf_hub_url", "formatting", "columns", "tags", "split", "num_samples"):
        for value in ODD[:-3]:
            info({"m": {"file_name": "a.json", "formatting": "sharegpt"} | {key: value}})
            with contextlib.suppress(LorakitError):
                config(FACTORY | {"dataset": "m"})
    for key in ("type", "path", "name", "field", "data_files", "message_property_mappings", "roles", "roles_to_train", "field_messages"):
        for value in ODD:
            with contextlib.suppress(LorakitError):
                config(AXOLOTL | {"datasets": [{"path": "rows.jsonl", "type": "chat_template"} | {key: value}]})


def test_trls_old_name_of_its_loss_is_that_loss() -> None:
    assert config(TRL | {"loss_type": "chunked_nll"}) == config(TRL | {"loss_type": "nll"}) == config(TRL)
    with pytest.raises(BadParameter, match="dpo is trained with sigmoid"):
        config(TRL | {"loss_type": "chunked_nll", "beta": 0.1})


@pytest.mark.parametrize(
    ("rl", "kind", "row"),
    [
        ("dpo", "chatml.intel", {"system": "be", "question": "hi", "chosen": "yo", "rejected": "no"}),
        ("dpo", "llama3.argilla", {"system": "be", "instruction": "hi", "chosen_response": "yo", "rejected_response": "no"}),
        ("dpo", "chatml.icr", {"system": "be", "input": "hi", "chosen": "yo", "rejected": "no"}),
        ("dpo", "llama3.prompt_pairs", {"system": "be", "prompt": "hi", "chosen": "yo", "rejected": "no"}),
        ("dpo", "chatml.ultra", {
            "prompt": "hi", "chosen": [("user", "hi"), ("assistant", "yo")], "rejected": [("user", "hi"), ("assistant", "no")],
        }),
        ("dpo", "chat_template.default", {"prompt": [("user", "hi")], "chosen": ("assistant", "yo"), "rejected": ("assistant", "no")}),
        ("kto", "chatml.argilla", {"system": "be", "instruction": "hi", "completion": "yo", "label": True}),
        ("kto", "llama3.intel", {"system": "be", "question": "hi", "completion": "yo", "label": True}),
        ("kto", "chatml.ultra", {"system": "be", "prompt": "hi", "completion": "yo", "label": True}),
    ],
)  # fmt: skip
def test_axolotls_types_of_judged_rows_are_chats_of_their_template(rows: Path, rl: str, kind: str, row: dict[str, Any]) -> None:
    """The rows are written as axolotl's documentation of each type has them."""
    written = json.loads(json.dumps(row), object_hook=lambda d: {key: _messages(value) for key, value in d.items()})
    (rows / "rows.jsonl").write_text("".join(json.dumps(written | {"n": i}) + "\n" for i in range(20)))
    found = config(AXOLOTL | {"rl": rl, "datasets": [{"path": "rows.jsonl", "type": kind}]})
    read_ = read_rows(found)
    assert (found.task, read_.task) == (rl, rl)
    system = [{"role": "system", "content": "be"}] if "system" in row else []
    yes, no = ([{"role": "assistant", "content": text}] for text in ("yo", "no"))
    answers = {"completion": yes, "label": True} if rl == "kto" else {"chosen": yes, "rejected": no}
    row = {key: value for key, value in read_.train[0].items() if key != "n"}
    assert row == {"prompt": [*system, {"role": "user", "content": "hi"}], **answers}
    template = kind.partition(".")[0]
    assert found.chat_template == (None if template == "chat_template" else TEMPLATES[template])


def _messages(value: Any) -> Any:
    """["user", "hi"] as a message, and lists of them."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return {"role": value[0], "content": value[1]}
    return [_messages(part) for part in value] if isinstance(value, list) else value


def test_trl_evaluates_on_the_test_split_of_a_saved_data_set(rows: Path) -> None:
    for split, n in (("train", 12), ("test", 3)):
        (rows / "saved" / split).mkdir(parents=True)
        (rows / "saved" / split / "rows.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(n)))
    file = TRL | {"dataset_name": "saved"}
    found = read(file | {"eval_strategy": "steps"})
    says(found, "dataset_test_split -> eval_data saved/test")
    held = read_rows(found.config)
    assert (len(held.train), [row["text"] for row in held.valid]) == (12, ["test 0", "test 1", "test 2"])
    assert config(file).eval_data == "saved"  # evaluation is not asked for
    assert config(file | {"eval_strategy": "steps"}, eval_data="rows.jsonl").eval_data == "rows.jsonl"
