"""TRL's keys: its SFTConfig, DPOConfig and KTOConfig over Transformers' training arguments, with ScriptArguments and ModelConfig.

What `trl sft --config FILE` reads. That it is DPO or KTO stands in the command there; here it is said by keys that only they have
(`beta`, `desirable_weight`), by `task`, or by the rows.
"""

import os
from pathlib import Path
from typing import Any

from lorakit.core.errors import BadParameter
from lorakit.train.dialects.rule import Dialect, Draft, Idle, Joint, Only, To, show, words
from lorakit.train.dialects.shared import (
    CACHE,
    CODE,
    HF_DEFAULTS,
    LAUNCHER,
    TRAINING,
    Source,
    choose_method,
    four_bits,
    hold_out,
    hub_or_file,
    precision,
    put_sources,
    settle_training,
    sites_of,
)

EXACT = "packing is exact here: documents in a window never see each other"
REFERENCE = "the reference is the same base with the adapter switched off"
ONLY_DPO = (
    "beta",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "f_divergence_type",
    "sync_ref_model",
    "use_weighting",
    "disable_dropout",
)
ONLY_KTO = ("desirable_weight", "undesirable_weight")
RATES = {"causal-lm": 2e-5, "dpo": 1e-6, "kto": 1e-6}
"""Each trainer's own learning rate."""


def settle(draft: Draft) -> None:
    """What hangs together: task, adapter, data, precision."""
    settle_training(draft)
    task = _task(draft)
    _adapter(draft)
    _data(draft)
    if "torch_dtype" in draft.given and "dtype" not in draft.given:
        precision(draft, "torch_dtype")
    else:
        precision(draft, "dtype")
    loss = words(draft.get("loss_type")) if "loss_type" in draft.given else []
    usual = {"causal-lm": ("nll", "chunked_nll"), "dpo": ("sigmoid",), "kto": ("kto",)}[task]
    if loss and (len(loss) > 1 or loss[0] not in usual):
        raise draft.refuse("loss_type", f"{task} is trained with {usual[0]} here; leave it out")
    if task == "causal-lm":
        _trained_on(draft)
    if draft.get("chat_template_path") is not None:
        draft.put("chat_template", draft.get("chat_template_path"), "chat_template_path")
    draft.default("learning_rate", RATES[task])


def _trained_on(draft: Draft) -> None:
    """Completions of pairs, unless completion_only_loss is false; all of a chat, unless assistant_only_loss is true."""
    if draft.get("assistant_only_loss") is True:
        draft.put("train_on", "assistant", "assistant_only_loss")
    elif draft.get("completion_only_loss") is not None:
        draft.put("train_on", "assistant" if draft.get("completion_only_loss") else "all", "completion_only_loss")
    elif draft.whole and "train_on" not in draft.own:
        chats = _holds_chats(draft.known("train_data"))
        draft.default("train_on", "all" if chats else "assistant")
        if chats:
            draft.notes.append("all of a chat is trained on, as in TRL; give assistant_only_loss: true for the assistant's turns alone")


def _holds_chats(train_data: Any) -> bool:
    """Whether the first row is a chat rather than a prompt with its completion; where it cannot be seen, it is taken for a chat."""
    from lorakit.core.errors import DataError
    from lorakit.data.folder import open_file

    first = next(iter(train_data), "") if isinstance(train_data, dict) else train_data
    path = Path(os.path.expanduser(str(first)))
    if not os.path.isfile(path):
        return True
    try:
        row = open_file(path).read(0)
    except (DataError, IndexError):
        return True  # reading the data will say what is wrong
    return not (isinstance(row, dict) and {"prompt", "completion"} <= row.keys())


def _task(draft: Draft) -> str:
    said = draft.own.get("task")
    if isinstance(said, str) and said in RATES:
        return str(said)
    key = next((key for key in ONLY_KTO if key in draft.given or key in draft.own), None)
    task = "kto" if key else "dpo"
    key = key or next((key for key in ONLY_DPO if key in draft.given or key in draft.own), None)
    if key is None or not draft.whole:
        return "causal-lm"
    draft.values["task"] = task
    draft.sources["task"] = key
    draft.notes.append(f"{key} -> task {task} (only trl {task} has it)")
    return task


def _adapter(draft: Draft) -> None:
    peft = draft.get("use_peft", False)
    if draft.whole and peft is not True and "method" not in draft.own:
        raise BadParameter("TRL trains all weights where use_peft is not true, which lorakit does not; add use_peft: true (or a method)")
    if draft.get("lora_task_type", "CAUSAL_LM") not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise draft.refuse("lora_task_type", "the task follows from the rows; leave it out")
    parts: list[tuple[str, str]] = []
    args: dict[str, tuple[Any, str]] = {}
    names: list[str] = []
    if draft.get("load_in_4bit") is True:
        if draft.get("bnb_4bit_quant_type", "nf4") != "nf4":
            raise draft.refuse("bnb_4bit_quant_type", "use nf4")
        four_bits(draft, "load_in_4bit", nested=draft.get("use_bnb_nested_quant", False) is True, method=names)
    parts += [(name, "load_in_4bit") for name in names]
    for key, method in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if draft.get(key) is True:
            parts.append((method, key))
    if "lora_target_modules" in draft.given:
        args["sites"] = (sites_of(draft.get("lora_target_modules")), "lora_target_modules")
    if draft.get("lora_modules_to_save"):
        args["unfreeze"] = (words(draft.get("lora_modules_to_save")), "lora_modules_to_save")
    defaults: dict[str, Any] = {"r": 16, "alpha": 32.0, "dropout": 0.05}
    if draft.whole and "sites" not in args and "sites" not in draft.own:
        from lorakit.train.dialects.peft_targets import default_targets

        defaults["sites"] = default_targets(str(draft.known("model") or "bundled"), "lora_target_modules")
    choose_method(draft, parts, args, defaults)


def _data(draft: Draft) -> None:
    for key, usual in (("dataset_train_split", "train"),):
        if draft.get(key, usual) != usual:
            raise draft.refuse(key, "save that split as a file of its own and give it as dataset_name")
    columns = {}
    if draft.get("dataset_text_field", "text") != "text":
        columns = {"text": str(draft.get("dataset_text_field"))}
    if "dataset_name" in draft.given:
        path = hub_or_file(str(draft.get("dataset_name")), draft.get("dataset_config"))
        put_sources(draft, [Source(path, "auto", columns)], "dataset_name")
    elif "datasets" in draft.given:
        put_sources(draft, _mixture(draft, columns), "datasets")
    elif columns:
        draft.put("columns", columns, "dataset_text_field")
    if "dataset_config" in draft.given and not str(draft.known("train_data")).startswith("hf:"):
        draft.without_effect("dataset_config", "a file has no configurations")
    test = _test_split(draft, columns)
    hold_out(draft, "eval_strategy", 0.0, held=test, said="dataset_test_split")
    if "dataset_test_split" in draft.given and test is None:
        draft.without_effect("dataset_test_split", "give a file as eval_data to hold other rows out")


def _test_split(draft: Draft, columns: dict[str, str]) -> Source | None:
    """What TRL evaluates on: that split of a data set saved on disk, where evaluation is asked for."""
    train, wanted = draft.known("train_data"), draft.get("eval_strategy") not in (None, False, "no")
    if not wanted or not isinstance(train, str) or "eval_data" in draft.own:
        return None
    path = Path(os.path.expanduser(train), str(draft.get("dataset_test_split", "test")))
    return Source(str(path), "auto", columns) if os.path.isdir(path) else None


def _mixture(draft: Draft, columns: dict[str, str]) -> list[Source]:
    entries = draft.get("datasets")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and isinstance(entry.get("path"), str) for entry in entries):
        raise BadParameter(f"datasets is {show(entries)}; expected a list of {{path, name, split}}")
    sources = []
    for i, entry in enumerate(entries, 1):
        odd = [k for k, v in entry.items() if v is not None and k not in ("path", "name", "split", "columns", "data_files")]
        if odd or entry.get("split", "train") != "train":
            raise BadParameter(f"datasets[{i}]: {(odd or ['split'])[0]} is not read; save the rows as a file and give its path")
        files = entry.get("data_files")
        path = files if isinstance(files, str) else hub_or_file(entry["path"], entry.get("name"))
        sources.append(Source(path, "auto", columns))
    return sources


TRL = Dialect(
    name="trl",
    title="TRL",
    marks=frozenset({"dataset_name", "use_peft"}),
    keys=TRAINING
    | {
        "model_name_or_path": To("model"),
        "model_revision": Only(("main",), "download that revision and give its folder as model"),
        "torch_dtype": Joint("dtype"),
        "dtype": Joint("dtype"),
        "attn_implementation": Idle("attention is chosen by itself: packed documents never see each other"),
        "trust_remote_code": Idle(CODE),
        "model_init_kwargs": Only(({},), "give dtype and load_in_4bit as keys of their own"),
        "use_peft": Joint("method"),
        "lora_r": To("r"),
        "lora_alpha": To("alpha"),
        "lora_dropout": To("dropout"),
        "lora_target_modules": Joint("sites"),
        "lora_target_parameters": Only(([],), "experts are sites: lora_target_modules: all-linear has them"),
        "lora_modules_to_save": Joint("unfreeze"),
        "lora_task_type": Joint("task"),
        "use_rslora": Joint("method"),
        "use_dora": Joint("method"),
        "load_in_8bit": Only((False,), "the base is stored in 4 bits (load_in_4bit: true) or as it is"),
        "load_in_4bit": Joint("quantize"),
        "bnb_4bit_quant_type": Joint("quantize"),
        "use_bnb_nested_quant": Joint("quantize double_quant"),
        "bnb_4bit_quant_storage": Idle("codes are stored as bytes"),
        "dataset_name": Joint("train_data"),
        "dataset_config": Joint("train_data"),
        "dataset_train_split": Joint("train_data"),
        "dataset_test_split": Joint("eval_data"),
        "dataset_streaming": Idle("files that are larger than memory are streamed by themselves"),
        "datasets": Joint("train_data"),
        "dataset_text_field": Joint("columns"),
        "dataset_kwargs": Only(({},), "leave it out"),
        "dataset_num_proc": To("preprocessing_num_workers"),
        "shuffle_dataset": Idle("the order is random and repeats with the seed"),
        "max_seq_length": To("max_length"),
        "truncation_mode": Only(("keep_start",), "the start is kept; use keep_start"),
        "packing_strategy": Idle(EXACT),
        "padding_free": Idle(EXACT),
        "eval_packing": Idle("both sides are packed alike; the loss is the same"),
        "pad_to_multiple_of": Idle("windows are filled, or padded as little as possible"),
        "pad_token": Idle("padding is never seen nor trained on"),
        "eos_token": Only((), "save a tokenizer with that token beside the model"),
        "chat_template_path": Joint("chat_template"),
        "completion_only_loss": Joint("train_on"),
        "assistant_only_loss": Joint("train_on"),
        "loss_type": Joint(""),
        "activation_offloading": Idle("activations stay on the device; gradient_checkpointing saves more"),
        "router_aux_loss_coef": Only((0,), "the router stays frozen; leave it out"),
        "disable_dropout": Joint(""),
        "label_smoothing": Only((0,), "DPO's labels are taken as they are; leave it out"),
        "precompute_ref_log_probs": Idle(REFERENCE),
        "precompute_ref_batch_size": Idle(REFERENCE),
        "f_divergence_type": Only(("reverse_kl",), "use reverse_kl"),
        "f_alpha_divergence_coef": Idle("it belongs to another divergence"),
        "sync_ref_model": Only((False,), REFERENCE + "; leave it out"),
        "ref_model_mixup_alpha": Idle(REFERENCE),
        "ref_model_sync_steps": Idle(REFERENCE),
        "use_weighting": Only((False,), "pairs have equal weights; leave it out"),
        "loss_weights": Only((), "one loss is trained; leave it out"),
        "rpo_alpha": Only((), "DPO's loss stands alone; leave it out"),
        "ld_alpha": Only((), "leave it out"),
        "discopop_tau": Idle("it belongs to another loss"),
        "max_prompt_length": Idle("max_length holds for prompt and answer together"),
        "max_completion_length": Idle("max_length holds for prompt and answer together"),
        "accelerate_config": Idle(LAUNCHER),
        "num_processes": Idle(LAUNCHER),
        "config": Idle("this is the file"),
        "ignore_bias_buffers": Idle(LAUNCHER),
        "project": Idle("the tracker reads it from the environment (WANDB_PROJECT, …)"),
        "trackio_space_id": Idle("trackers are tensorboard and wandb; report.html is always written"),
        "activation_checkpointing": To("gradient_checkpointing"),
        "overwrite_cache": Idle(CACHE),
    },
    settle=settle,
    defaults={key: value for key, value in HF_DEFAULTS.items() if key != "learning_rate"} | {"max_length": 1024, "packing": False},
    source="trl 1.16: SFTConfig, DPOConfig, KTOConfig, ScriptArguments, ModelConfig",
)  # fmt: skip
