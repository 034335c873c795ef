"""axolotl's keys: one YAML with `base_model`, `datasets` as a list of {path, type}, `adapter`, `sequence_len`, `micro_batch_size`."""

from typing import Any

from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.train.dialects.rule import Dialect, Draft, Idle, Joint, Only, To, number, show, words
from lorakit.train.dialects.shared import (
    CACHE,
    CODE,
    HUB,
    LOADING,
    TRAINING,
    Source,
    choose_method,
    four_bits,
    hold_out,
    hub_or_file,
    loraplus,
    named_template,
    per_epoch,
    precision,
    put_sources,
    settle_optimizer,
    settle_training,
    sites_of,
)

ATTENTION = "attention is chosen by itself: packed documents never see each other"
FAST = "the layers are made fast by lorakit itself"
CLASS = "the class is read from the model's configuration"
TRACKER = "the tracker reads it from the environment (WANDB_PROJECT, WANDB_ENTITY, …)"


def settle(draft: Draft) -> None:
    """What hangs together: adapter, data, sizes, intervals, precision."""
    settle_training(draft)
    settle_optimizer(draft, "optimizer")
    _adapter(draft)
    _task(draft)
    _data(draft)
    _sizes(draft)
    precision(draft)
    for key, ours in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        if key in draft.given and ours not in draft.given:
            per_epoch(draft, key, ours)
    if draft.get("gradient_checkpointing") is not None:
        value = draft.get("gradient_checkpointing")
        draft.put(
            "gradient_checkpointing", value is not False, "gradient_checkpointing", why="no offloading" if isinstance(value, str) else ""
        )
    _template(draft)
    _special(draft)
    _tracker(draft)
    if draft.whole and "learning_rate" not in draft.own:
        raise BadParameter("axolotl has no default of learning_rate; give it, e.g. learning_rate: 2e-4")
    if draft.get("auto_resume_from_checkpoints") is True:
        draft.put("resume", "auto", "auto_resume_from_checkpoints")
    if not any(key in draft.given or key in draft.own for key in ("warmup_steps", "warmup_ratio")) and draft.whole:
        draft.default("warmup_ratio", 0.03)
        draft.notes.append("warm-up is 3 % of the steps; axolotl's ends after 100 of them: give warmup_steps 100 for more than 3,333 steps")
    if not any(key in draft.given for key in ("bf16", "bfloat16", "float32")):
        draft.default("dtype", "bfloat16")  # its bf16 is auto


def _adapter(draft: Draft) -> None:
    kind = draft.get("adapter")
    if draft.whole and kind is None and "method" not in draft.own and not draft.get("relora"):
        raise BadParameter("axolotl trains all weights where adapter is left out, which lorakit does not; add adapter: lora (or a method)")
    if kind not in (None, "lora", "qlora"):
        raise draft.refuse("adapter", "choose lora or qlora, or name a method of lorakit list as method")
    parts: list[tuple[str, str]] = []
    args: dict[str, tuple[Any, str]] = {}
    init = draft.get("peft_init_lora_weights", True)
    if isinstance(init, str) and init.startswith("pissa"):
        parts.append(("pissa", "peft_init_lora_weights"))
        args["niter"] = (int(init.rpartition("_")[2]) if "niter" in init else 0, "peft_init_lora_weights")
    elif init in ("eva", "lora_ga"):
        parts.append((init, "peft_init_lora_weights"))
    elif init is not True:
        raise draft.refuse("peft_init_lora_weights", "choose true, pissa, pissa_niter_N, eva or lora_ga, or a method of lorakit list")
    for key, method in (("peft_use_rslora", "rslora"), ("peft_use_dora", "dora")):
        if draft.get(key) is True:
            parts.append((method, key))
    loraplus(draft, parts, args)
    if draft.get("lora_target_linear") is True:
        args["sites"] = ("all-linear", "lora_target_linear")
    elif "lora_target_modules" in draft.given:
        args["sites"] = (sites_of(draft.get("lora_target_modules")), "lora_target_modules")
    if "lora_modules_to_save" in draft.given and draft.get("lora_modules_to_save"):
        args["unfreeze"] = (words(draft.get("lora_modules_to_save")), "lora_modules_to_save")
    missing = [key for key, ours in (("lora_r", "r"), ("lora_alpha", "alpha")) if key not in draft.given and ours not in draft.own]
    if draft.whole and kind is not None and missing and not {"method", "init_adapter"} & {*draft.own, *draft.values}:
        raise BadParameter(f"axolotl has no default of {' and '.join(missing)}; give what is missing, as in lora_r: 16, lora_alpha: 32")
    choose_method(draft, parts, args, {"dropout": 0.0} | ({} if "sites" in args else {"sites": _targets(draft)} if draft.whole else {}))
    if draft.get("load_in_4bit") is True:
        four_bits(draft, "load_in_4bit", nested=True, method=[])
    elif kind == "qlora":
        raise BadParameter("adapter qlora wants load_in_4bit: true")


def _targets(draft: Draft) -> Any:
    from lorakit.train.dialects.peft_targets import default_targets

    if "sites" in draft.own or draft.get("lora_target_linear") is True or "lora_target_modules" in draft.given:
        return "all-linear"
    return default_targets(str(draft.known("model") or "bundled"), "lora_target_modules or lora_target_linear: true")


def _task(draft: Draft) -> None:
    rl = draft.get("rl")
    if rl is not None:
        if rl not in ("dpo", "kto"):
            raise draft.refuse("rl", "choose dpo or kto")
        draft.put("task", rl, "rl")
    if draft.get("train_on_inputs") is True:
        draft.put("train_on", "all", "train_on_inputs")


def _data(draft: Draft) -> None:
    entries = draft.get("datasets")
    if entries is None and draft.get("pretraining_dataset") is not None:
        given = draft.get("pretraining_dataset")
        listed = [{"path": given}] if isinstance(given, str) else given
        entries = [e | {"type": "pretrain"} if isinstance(e, dict) else e for e in listed] if isinstance(listed, list) else listed
        put_sources(draft, _sources(draft, entries, "pretraining_dataset"), "pretraining_dataset")
    elif entries is not None:
        put_sources(draft, _sources(draft, entries, "datasets"), "datasets")
    held = _sources(draft, draft.get("test_datasets"), "test_datasets") if draft.get("test_datasets") else []
    if len(held) > 1:
        raise draft.refuse("test_datasets", "one source is held out; join the files, or name one")
    fraction = number(draft, "val_set_size") if "val_set_size" in draft.given else 0.0
    hold_out(draft, "val_set_size", fraction, held=held[0] if held else None, said="test_datasets")


_ENTRY = {
    "path", "type", "name", "split", "data_files", "ds_type", "field", "field_messages", "message_property_mappings", "message_field_role",
    "message_field_content", "message_field_training", "roles", "roles_to_train", "train_on_eos", "train_on_eot", "chat_template",
    "conversation", "field_human", "field_model", "field_prompt", "field_chosen", "field_rejected", "field_completion", "field_label",
    "trust_remote_code", "text_column", "drop_system_message", "shards", "revision", "temperature", "chat_template_jinja",
    "preprocess_shards",
}  # fmt: skip
_SHAPES: dict[str, tuple[type, ...]] = {
    "type": (str, dict), "data_files": (str, list), "message_property_mappings": (dict,), "roles": (dict,), "roles_to_train": (list,),
    "trust_remote_code": (bool,), "drop_system_message": (bool,), "shards": (int,), "preprocess_shards": (int,),
    "temperature": (int, float),
}  # fmt: skip
"""What the keys of a data set hold, where it is no text."""
_USUAL_ROLES = {"user": ("human", "user"), "assistant": ("gpt", "assistant"), "system": ("system",), "tool": ("tool",)}


def _sources(draft: Draft, entries: Any, key: str) -> list[Source]:
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise BadParameter(f"{key} is {show(entries)}; expected a list of {{path, type}}")
    return [_source(draft, {k: v for k, v in entry.items() if v is not None}, f"{key}[{i}]") for i, entry in enumerate(entries, 1)]


def _source(draft: Draft, entry: dict[str, Any], where: str) -> Source:
    for name in entry:
        if name not in _ENTRY:
            raise BadParameter(f"{where} has the unknown key {name!r}. {did_you_mean(name, _ENTRY)}")
    if not isinstance(entry.get("path"), str):
        raise BadParameter(f"{where} names no path")
    for name, value in entry.items():
        kinds = _SHAPES.get(name, (str,))
        parts = [*value, *value.values()] if isinstance(value, dict) and name != "roles" else value if isinstance(value, list) else []
        if not isinstance(value, kinds) or not all(isinstance(part, str) for part in parts if part is not None):
            raise BadParameter(f"{where}: {name} is {show(value)}; expected {' or '.join(kind.__name__ for kind in kinds)}")
    for odd in ("shards", "preprocess_shards", "temperature", "revision"):
        if odd in entry:
            raise BadParameter(f"{where}: {odd} is not read; leave it out")
    if entry.get("split", "train") not in ("train", "test", "validation") or (
        entry.get("split", "train") != "train" and where.startswith("datasets")
    ):
        raise BadParameter(f"{where}: split {show(entry['split'])} is not read; save it as a file of its own and give its path")
    files = entry.get("data_files")
    path = entry["path"]
    if files is not None:
        files = [files] if isinstance(files, str) else files
        if len(files) != 1 or path not in ("json", "csv", "parquet", "text", "arrow"):
            raise BadParameter(f"{where}: give the file itself as path instead of data_files")
        path = files[0]
    else:
        path = hub_or_file(path, entry.get("name"))
    kind, columns = _kind(draft, entry, where)
    if (template := entry.get("chat_template")) is not None and "chat_template" not in draft.given:
        draft.given["chat_template"] = template
    return Source(path, kind, columns)


def _kind(draft: Draft, entry: dict[str, Any], where: str) -> tuple[str, dict[str, str]]:
    """Our format, and the columns whose names differ."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        return _custom(kind, where)
    if kind is None:
        return "auto", {}
    name = str(kind).split(":")[0]
    if name in ("completion", "pretrain"):
        field = entry.get("field", entry.get("text_column", "text"))
        return "text", {} if field == "text" else {"text": field}
    if name == "alpaca":
        if "chat_template" not in draft.values and not any(key in draft.given for key in ("chat_template", "chat_template_jinja")):
            draft.put("chat_template", "alpaca", where, why="type alpaca; the input is written behind the instruction")
        return "alpaca", {}
    if name in ("sharegpt", "chat_template") or str(kind).startswith(("sharegpt.", "chat_template.")):
        if str(kind) in ("chat_template.default", "chat_template.argilla", "chat_template.argilla_chat"):
            return _preferences(entry)
        return _messages(entry, where, sharegpt=name == "sharegpt")
    if (judged := _judged(draft, str(kind), where)) is not None:
        return judged
    raise BadParameter(
        f"{where}: type {show(kind)} is not read; use alpaca, chat_template or completion, or write the rows as prompt and completion and "
        "leave type out"
    )


def _messages(entry: dict[str, Any], where: str, *, sharegpt: bool) -> tuple[str, dict[str, str]]:
    names = {"role": entry.get("message_field_role", "role"), "content": entry.get("message_field_content", "content")}
    names |= entry.get("message_property_mappings") or {}
    for role, given in (entry.get("roles") or {}).items():
        odd = [word for word in (given if isinstance(given, list) else [given]) if word not in _USUAL_ROLES.get(role, ())]
        if odd:
            raise BadParameter(f"{where}: roles calls {role} {odd[0]!r}; rename it to {role} in the file")
    trained = set(entry.get("roles_to_train") or ["assistant"])
    if not trained <= {"assistant", "gpt"}:
        raise BadParameter(f"{where}: roles_to_train {show(sorted(trained))} is not done; assistant is, or all with train_on: all")
    if entry.get("train_on_eos", "turn") != "turn" or entry.get("train_on_eot", "turn") != "turn":
        raise BadParameter(f"{where}: train_on_eos is 'turn' here: the end of each trained turn is learned; leave it out")
    if entry.get("message_field_training", "train") != "train":
        raise BadParameter(
            f"{where}: message_field_training is called 'train' here; rename {entry['message_field_training']!r} in the file"
        )
    if entry.get("drop_system_message"):
        raise BadParameter(f"{where}: drop_system_message is not done; drop the messages in the file")
    field = entry.get("field_messages", "conversations" if sharegpt else "messages")
    if sharegpt or (names["role"], names["content"]) == ("from", "value"):
        return "sharegpt", {} if field == "conversations" else {"conversations": field}
    columns = {ours: str(theirs) for ours, theirs in names.items() if ours in ("role", "content") and ours != theirs}
    return "chat", columns | ({} if field == "messages" else {"messages": field})


def _preferences(entry: dict[str, Any]) -> tuple[str, dict[str, str]]:
    names = {
        "prompt": entry.get("field_messages", "prompt"),
        "chosen": entry.get("field_chosen", "chosen"),
        "rejected": entry.get("field_rejected", "rejected"),
    }
    return "preference", {ours: str(theirs) for ours, theirs in names.items() if ours != theirs}


_PROMPTS = {"argilla": "instruction", "intel": "question", "icr": "input", "prompt_pairs": "prompt", "ultra": "prompt"}


def _judged(draft: Draft, kind: str, where: str) -> tuple[str, dict[str, str]] | None:
    """`chatml.intel` and the like: the chat template, and what the prompt and its answers are called."""
    template, _, name = kind.partition(".")
    if template not in ("chatml", "llama3") or name not in _PROMPTS or draft.get("rl") not in ("dpo", "kto"):
        return None
    if "chat_template" not in draft.values and not any(key in draft.given for key in ("chat_template", "chat_template_jinja")):
        draft.put("chat_template", template, where, why=f"type {kind}")
    if draft.get("rl") == "kto":
        names = {"instruction": _PROMPTS[name], "output": "completion", "kto_tag": "label"}
        shape = "feedback"
    else:
        names = {"instruction": _PROMPTS[name]} if name != "ultra" else {}  # ultra's answers are messages
        names |= {"chosen": "chosen_response", "rejected": "rejected_response"} if name == "argilla" else {}
        shape = "preference"
    return shape, names


def _custom(kind: dict[str, Any], where: str) -> tuple[str, dict[str, str]]:
    """A type spelled out: names of columns are taken over, formats are not."""
    odd = [name for name, value in kind.items() if value and not name.startswith("field_")]
    if odd or kind.get("field_system"):
        raise BadParameter(
            f"{where}: type.{(odd or ['field_system'])[0]} is not done; write the rows as prompt and completion and leave type out"
        )
    for wanted, shape in (("rejected", "preference"), ("label", "feedback"), ("instruction", "alpaca")):
        if f"field_{wanted}" in kind:
            names = {name.removeprefix("field_"): str(value) for name, value in kind.items() if value}
            return shape, {ours: theirs for ours, theirs in names.items() if ours != theirs}
    return "auto", {}


def _sizes(draft: Draft) -> None:
    """batch_size = micro_batch_size · gradient_accumulation_steps, of which two are enough."""
    if "batch_size" in draft.given:
        sizes = {
            key: int(number(draft, key)) for key in ("batch_size", "micro_batch_size", "gradient_accumulation_steps") if key in draft.given
        }
        total, micro, steps = sizes["batch_size"], sizes.get("micro_batch_size"), sizes.get("gradient_accumulation_steps")
        if micro and steps is None:
            if total % micro:
                raise BadParameter(f"batch_size {total} is no multiple of micro_batch_size {micro}")
            draft.put("gradient_accumulation_steps", total // micro, "batch_size")
        elif micro is None or steps is None or micro * steps != total:
            raise BadParameter(
                f"batch_size {total} is axolotl's for micro_batch_size times gradient_accumulation_steps; give those two, or "
                "per_device_train_batch_size for the rows of one forward"
            )
    if "micro_batch_size" in draft.given and "eval_batch_size" not in draft.given:
        draft.default("per_device_eval_batch_size", draft.get("micro_batch_size"))
    if draft.get("eval_sample_packing") is not None and draft.get("eval_sample_packing") != draft.get("sample_packing"):
        draft.without_effect("eval_sample_packing", "both sides are packed alike; the loss is the same")


def _template(draft: Draft) -> None:
    jinja, name = draft.get("chat_template_jinja"), draft.get("chat_template")
    if jinja is not None:
        draft.put("chat_template", jinja, "chat_template_jinja")
    elif name is not None:
        name = str(name)
        fallback = name.removeprefix("tokenizer_default_fallback_")
        if name == "tokenizer_default":
            draft.without_effect("chat_template tokenizer_default", "the tokenizer's own chat template is used")
        else:
            named_template(draft, "chat_template", fallback, keep_own=fallback != name)


def _special(draft: Draft) -> None:
    """Special tokens may be said again, not changed; which token pads does not matter."""
    from lorakit.train.source_model import load_tokenizer

    found = draft.get("special_tokens") or {}
    if not isinstance(found, dict):
        raise BadParameter(f"special_tokens is {show(found)}; expected {{pad_token: …}}")
    given = {name: value for name, value in found.items() if value is not None}
    if given.pop("pad_token", None) is not None:
        draft.without_effect("special_tokens.pad_token", "padding is never seen nor trained on")
    if given:
        own = load_tokenizer(str(draft.known("model") or "bundled"))
        for name, value in given.items():
            if str(getattr(own, name, None)) != str(value):
                raise BadParameter(
                    f"special_tokens.{name} {value} is not the tokenizer's {getattr(own, name, None)}; save a tokenizer with it"
                )
        draft.without_effect("special_tokens", "they are the tokenizer's own")


def _tracker(draft: Draft) -> None:
    if any(draft.get(key) for key in ("wandb_project", "use_wandb")) and draft.get("wandb_mode") != "disabled":
        draft.put("report_to", "wandb", "wandb_project" if draft.get("wandb_project") else "use_wandb")
        if draft.get("wandb_name") is not None:
            draft.put("run_name", str(draft.get("wandb_name")), "wandb_name")
    elif draft.get("use_tensorboard") is True:
        draft.put("report_to", "tensorboard", "use_tensorboard")


_HF_ONLY = ("do_train", "do_eval", "do_predict", "per_device_train_batch_size", "per_device_eval_batch_size", "optim")

AXOLOTL = Dialect(
    name="axolotl",
    title="axolotl",
    marks=frozenset({"base_model", "datasets", "adapter"}),
    keys={key: rule for key, rule in TRAINING.items() if key not in _HF_ONLY}
    | {
        "base_model": To("model"),
        "base_model_config": Only((), "the configuration is the model's own; leave it out"),
        "model_type": Idle(CLASS),
        "tokenizer_type": Idle(CLASS),
        "tokenizer_config": Only((), "the tokenizer is the model's own; leave it out"),
        "tokenizer_use_fast": Only((True,), "tokenizers are the fast ones"),
        "tokenizer_legacy": Idle("tokenizers are the fast ones"),
        "is_llama_derived_model": Idle(CLASS),
        "is_mistral_derived_model": Idle(CLASS),
        "trust_remote_code": Idle(CODE),
        "revision_of_model": Only(("main",), "download that revision and give its folder as base_model"),
        "load_in_8bit": Only((False,), "the base is stored in 4 bits (load_in_4bit: true) or as it is (load_in_8bit: false)"),
        "load_in_4bit": Joint("quantize"),
        "gptq": Only((False,), "use load_in_4bit: true"),
        "strict": Idle("unknown keys are always errors"),
        "adapter": Joint("method"),
        "lora_model_dir": To("init_adapter"),
        "lora_r": To("r"),
        "lora_alpha": To("alpha"),
        "lora_dropout": To("dropout"),
        "lora_target_modules": Joint("sites"),
        "lora_target_linear": Joint("sites"),
        "lora_target_parameters": Only(([],), "experts are sites: lora_target_linear: true has them"),
        "lora_modules_to_save": Joint("unfreeze"),
        "lora_fan_in_fan_out": Idle("how a weight is stored is read from its module"),
        "lora_on_cpu": Idle("an adapter is loaded where its base is"),
        "lora_mlp_kernel": Idle(FAST),
        "lora_qkv_kernel": Idle(FAST),
        "lora_o_kernel": Idle(FAST),
        "peft_use_dora": Joint("method"),
        "peft_use_rslora": Joint("method"),
        "peft_init_lora_weights": Joint("method niter"),
        "peft_layers_to_transform": Only(([],), "name the layers as sites, e.g. lora_target_modules: 're:.*layers\\.(0|1)\\..*'"),
        "peft_layer_replication": Only(([],), "leave it out"),
        "loraplus_lr_ratio": Joint("method ratio"),
        "loraplus_lr_embedding": Joint("embedding_lr"),
        "relora": Only((False,), "use method: relora"),
        "unfrozen_parameters": Only(([],), "use unfreeze: [modules]"),
        "datasets": Joint("train_data data_format columns"),
        "pretraining_dataset": Joint("train_data"),
        "test_datasets": Joint("eval_data"),
        "val_set_size": Joint("eval_fraction"),
        "dataset_prepared_path": Idle(CACHE),
        "dataset_processes": To("preprocessing_num_workers"),
        "dataset_num_proc": To("preprocessing_num_workers"),
        "dataset_keep_in_memory": Idle(CACHE),
        "dataset_exact_deduplication": Only((False,), "remove equal rows from the file"),
        "shuffle_merged_datasets": Only((True,), "the order is random and repeats with the seed"),
        "skip_prepare_dataset": Only((False,), "data are always tokenized here"),
        "streaming": Idle("files that are larger than memory are streamed by themselves"),
        "default_system_message": Only((), "write the system message into the rows"),
        "sequence_len": To("max_length"),
        "sample_packing": To("packing"),
        "eval_sample_packing": Joint(""),
        "sample_packing_group_size": Idle("packing is exact over all documents"),
        "sample_packing_bin_size": Idle("packing is exact over all documents"),
        "pad_to_sequence_len": Idle("windows are filled, or padded as little as possible"),
        "multipack_real_batches": Idle("packing is exact over all documents"),
        "curriculum_sampling": Only((False,), "the order is random and repeats with the seed"),
        "batch_flattening": Idle(FAST),
        "excess_length_strategy": Idle("what becomes of long samples is printed with its count"),
        "micro_batch_size": To("per_device_train_batch_size"),
        "eval_batch_size": To("per_device_eval_batch_size"),
        "batch_size": Joint("gradient_accumulation_steps"),
        "num_epochs": To("num_train_epochs"),
        "optimizer": Joint(""),
        "lr_scheduler": To("lr_scheduler_type"),
        "cosine_min_lr_ratio": Only((0,), "the cosine ends at 0; leave it out"),
        "cosine_constant_lr_ratio": Only((), "leave it out"),
        "lr_quadratic_warmup": Only((False,), "warm-up is linear"),
        "embedding_lr": Only((), "use loraplus_lr_ratio with loraplus_lr_embedding"),
        "lr_groups": Only(([],), "a method may have rates by role, see lorakit show loraplus"),
        "train_on_inputs": Joint("train_on"),
        "rl": Joint("task"),
        "rl_beta": To("beta"),
        "dpo_beta": To("beta"),
        "kto_desirable_weight": To("desirable_weight"),
        "kto_undesirable_weight": To("undesirable_weight"),
        "remove_unused_columns": Idle("columns that are not used are ignored"),
        "reward_model": Only((False,), "reward models are not trained; use rl: dpo or kto"),
        "float16": Joint("dtype"),
        "bfloat16": Joint("dtype"),
        "float32": Idle("float32 is what is used unless bf16 says otherwise"),
        "fp8": Only((False,), "use bf16: true"),
        "gradient_checkpointing": Joint("gradient_checkpointing"),
        "evals_per_epoch": Joint("eval_steps"),
        "saves_per_epoch": Joint("save_steps"),
        "chat_template": Joint("chat_template"),
        "chat_template_jinja": Joint("chat_template"),
        "special_tokens": Joint(""),
        "tokens": Only(([],), "extend the tokenizer and the base first"),
        "added_tokens_overrides": Only(({},), "extend the tokenizer and the base first"),
        "resize_token_embeddings_to_32x": Only((False,), "an adapted embedding keeps its size"),
        "use_wandb": Joint("report_to"),
        "wandb_project": Joint("report_to"),
        "wandb_name": Joint("run_name"),
        "wandb_mode": Joint("report_to"),
        "wandb_entity": Idle(TRACKER),
        "wandb_watch": Idle(TRACKER),
        "wandb_run_id": Idle(TRACKER),
        "wandb_log_model": Idle(HUB),
        "use_tensorboard": Joint("report_to"),
        "use_mlflow": Idle("trackers are tensorboard and wandb; report.html is always written"),
        "mlflow_tracking_uri": Idle("trackers are tensorboard and wandb; report.html is always written"),
        "mlflow_experiment_name": Idle("trackers are tensorboard and wandb; report.html is always written"),
        "auto_resume_from_checkpoints": Joint("resume"),
        "loss_watchdog_threshold": Idle("a loss that is not finite is an error"),
        "loss_watchdog_patience": Idle("a loss that is not finite is an error"),
        "gc_steps": Idle("the allocator keeps what it will use again"),
        "profiler_steps": Idle("no profile is taken"),
        "eval_table_size": Idle("report.html holds samples: report_samples"),
        "eval_max_new_tokens": Idle("report.html holds samples: report_samples"),
        "flash_attention": Idle(ATTENTION),
        "xformers_attention": Idle(ATTENTION),
        "sdp_attention": Idle(ATTENTION),
        "flex_attention": Idle(ATTENTION),
        "eager_attention": Idle(ATTENTION),
        "attn_implementation": Idle(ATTENTION),
        "s2_attention": Only((False,), "use method: longlora"),
        "flash_attn_cross_entropy": Idle(FAST),
        "flash_attn_rms_norm": Idle(FAST),
        "unsloth_lora_mlp": Idle(FAST),
        "unsloth_lora_qkv": Idle(FAST),
        "unsloth_lora_o": Idle(FAST),
        "unsloth_cross_entropy_loss": Idle(FAST),
        "plugins": Idle("no plugin is loaded; what it switches on has to be a key of its own"),
        "liger_rope": Idle(FAST),
        "liger_rms_norm": Idle(FAST),
        "liger_glu_activation": Idle(FAST),
        "liger_layer_norm": Idle(FAST),
        "liger_fused_linear_cross_entropy": Idle(FAST),
        "cut_cross_entropy": Idle(FAST),
        "device_map": Idle("the base is on one device, or sharded by accelerate launch --use_fsdp"),
        "low_cpu_mem_usage": Idle("models are always loaded without a second copy"),
        "debug": Idle(LOADING),
        "hf_use_auth_token": Idle("the token is read from the environment (HF_TOKEN)"),
        "push_dataset_to_hub": Idle(HUB),
    },
    settle=settle,
    defaults={"seed": 42, "max_length": 512, "per_device_train_batch_size": 1, "packing": False, "group_by_length": False},
    source="utils/schemas/{config,peft,training,datasets}.py of axolotl, 2026",
)  # fmt: skip
