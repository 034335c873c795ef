"""What the dialects share: Transformers' TrainingArguments, the choice of a method, precision, schedules and sources.

Names and defaults of TrainingArguments as of transformers 5.23, with some that older files still hold.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.core.errors import BadParameter
from lorakit.core.method import describe
from lorakit.train.chat_templates import TEMPLATES, template_named
from lorakit.train.dialects.rule import Draft, Idle, Joint, Only, Rule, To, number, show, words

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused", "adamw_torch_xla", "adamw_anyprecision")
COMPACT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch_8bit", "adamw_torch_4bit")
"""AdamW that stores its state in fewer bits or on the host: the same rule, other storage."""

LOADING = "batches are made in this process"
LAUNCHER = "processes are started by accelerate launch"
FILES = "files are written in one way: atomically, with the adapter's own format"
HUB = "nothing is uploaded"
CACHE = "tokens are cached by their content"
CODE = "no code of a model's folder is run"

TRAINING: dict[str, Rule] = {
    "per_device_train_batch_size": To("per_device_train_batch_size"),
    "per_device_eval_batch_size": To("per_device_eval_batch_size"),
    "per_gpu_train_batch_size": To("per_device_train_batch_size"),
    "optim": Joint(""),
    "optim_args": Only((), "AdamW has betas 0.9 and 0.999 and eps 1e-8 here; leave it out"),
    "adam_beta1": Only((0.9,), "AdamW's beta1 is 0.9; leave it out"),
    "adam_beta2": Only((0.999,), "AdamW's beta2 is 0.999; leave it out"),
    "adam_epsilon": Only((1e-8,), "AdamW's eps is 1e-8; leave it out"),
    "bf16": Joint("dtype"),
    "fp16": Joint("dtype"),
    "bf16_full_eval": Idle("evaluation runs in the dtype of training"),
    "fp16_full_eval": Only((False,), "use bf16: true (dtype: bfloat16)"),
    "tf32": Idle("products of fp32 matrices keep PyTorch's own setting"),
    "use_cpu": Joint(""),
    "no_cuda": Joint(""),
    "save_strategy": Joint("save_steps"),
    "eval_strategy": Joint("eval_steps"),
    "evaluation_strategy": Joint("eval_steps"),
    "save_steps": Joint("save_steps"),
    "eval_steps": Joint("eval_steps"),
    "logging_steps": Joint("logging_steps"),
    "logging_strategy": Idle("losses are logged every logging_steps"),
    "warmup_steps": Joint("warmup_steps warmup_ratio"),
    "report_to": Joint("report_to"),
    "resume_from_checkpoint": Joint("resume"),
    "do_train": Only((True,), "lorakit train trains; lorakit eval evaluates a saved adapter"),
    "do_eval": Idle("held-out data are always evaluated"),
    "do_predict": Only((False,), "use lorakit generate on the saved adapter"),
    "predict_with_generate": Only((False,), "use lorakit generate on the saved adapter"),
    "train_sampling_strategy": Joint("group_by_length"),
    "neftune_noise_alpha": Only((0,), "noise on embeddings is not added; leave it out"),
    "label_smoothing_factor": Only((0,), "the loss is the plain one; leave it out"),
    "lr_scheduler_kwargs": Only(({}, "{}"), "schedules have no further arguments; leave it out"),
    "auto_find_batch_size": Only((False,), "lorakit train --dry-run estimates the memory of a batch size"),
    "metric_for_best_model": Only(("loss", "eval_loss"), "the best model is the one with the lowest eval loss; use eval_loss"),
    "greater_is_better": Only((False,), "the best model is the one with the lowest eval loss"),
    "data_seed": Only((), "one seed decides init, data order and dropout; use seed"),
    "deepspeed": Only((), "a base is sharded by FSDP2: leave it out and start with accelerate launch --use_fsdp"),
    "fsdp": Only(("", [], False), "leave it out and start with accelerate launch --use_fsdp"),
    "fsdp_config": Only(({},), "leave it out and start with accelerate launch --use_fsdp"),
    "push_to_hub": Only((False,), "nothing is uploaded by training; upload output_dir/adapter yourself"),
    "hub_model_id": Idle(HUB),
    "hub_strategy": Idle(HUB),
    "hub_private_repo": Idle(HUB),
    "hub_token": Idle(HUB),
    "use_liger_kernel": Idle("the loss is computed by chunks without it"),
    "length_column_name": Idle("lengths are counted in tokens"),
    "remove_unused_columns": Idle("columns that are not used are ignored"),
    "overwrite_output_dir": Idle("a folder with another run is never overwritten; name another output_dir"),
    "save_only_model": Idle("a checkpoint always holds what resuming needs"),
    "save_safetensors": Idle(FILES),
    "save_on_each_node": Idle(FILES),
    "logging_dir": Idle("metrics.jsonl lies in output_dir"),
    "logging_first_step": Idle("losses are logged every logging_steps"),
    "logging_nan_inf_filter": Idle("a loss that is not finite is an error"),
    "log_level": Idle("--quiet is the only other level"),
    "disable_tqdm": Idle("--quiet hides the progress"),
    "include_num_input_tokens_seen": Idle("tokens are always counted"),
    "include_tokens_per_second": Idle("tokens are always counted"),
    "average_tokens_across_devices": Idle("the mean is always over all tokens of a step"),
    "prediction_loss_only": Idle("only losses are needed"),
    "eval_on_start": Idle("evaluation is counted from the first step"),
    "eval_delay": Idle("evaluation is counted from the first step"),
    "eval_accumulation_steps": Idle("evaluation keeps sums alone"),
    "full_determinism": Idle("the same seed gives the same bits on a CPU"),
    "gradient_checkpointing_kwargs": Idle("checkpointing is always the non-reentrant one"),
    "torch_compile_backend": Idle("layers are compiled by inductor"),
    "torch_compile_mode": Idle("layers are compiled in inductor's default mode"),
    "torch_empty_cache_steps": Idle("the allocator keeps what it will use again"),
    "use_cache": Idle("training keeps no cache of keys and values"),
    "skip_memory_metrics": Idle("memory is estimated by --dry-run"),
    "accelerator_config": Idle(LAUNCHER),
    "ddp_timeout": Idle(LAUNCHER),
    "ddp_backend": Idle(LAUNCHER),
    "ddp_find_unused_parameters": Idle("only the adapters' gradients are reduced"),
    "ddp_bucket_cap_mb": Idle("only the adapters' gradients are reduced"),
    "local_rank": Idle(LAUNCHER),
    **{
        f"dataloader_{name}": Idle(LOADING)
        for name in ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "drop_last", "in_order")
    },
}
"""Transformers' TrainingArguments whose name or meaning differs from ours; the others are ours already."""

HF_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "seed": 42,
    "group_by_length": False,
}
"""TrainingArguments' own, where ours differ."""


@dataclass(frozen=True)
class Source:
    """One data set of a dialect's file: where it is and what its rows are in our words."""

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0


def settle_training(draft: Draft) -> None:
    """TrainingArguments' keys that are not renamed one by one."""
    settle_optimizer(draft, "optim")
    _steps(draft)
    _warmup(draft)
    _reports(draft)
    if (resume := draft.get("resume_from_checkpoint")) is not None and resume is not False:
        if resume is not True and resume != "auto":
            raise draft.refuse("resume_from_checkpoint", "resume: auto goes on from the newest checkpoint in output_dir")
        draft.put("resume", "auto", "resume_from_checkpoint")
    if (order := draft.get("train_sampling_strategy")) is not None:
        known = {"random": False, "group_by_length": True}
        if order not in known:
            raise draft.refuse("train_sampling_strategy", "choose random or group_by_length")
        draft.put("group_by_length", known[order], "train_sampling_strategy")
    for key in ("use_cpu", "no_cuda"):
        if draft.get(key) is True and _accelerator():
            raise draft.refuse(key, "set ACCELERATE_USE_CPU=true in the environment")


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def settle_optimizer(draft: Draft, key: str) -> None:
    name = draft.get(key)
    if name is None:
        return
    if name in COMPACT:
        draft.without_effect(f"{key} {name}", "AdamW, with its state in fp32: it holds the adapter's parameters alone")
    elif name in ADAMW:
        if name not in ("adamw_torch", "adamw_torch_fused"):
            draft.without_effect(f"{key} {name}", "AdamW is PyTorch's")
    else:
        raise draft.refuse(key, "the optimizer is AdamW (adamw_torch); a method may bring its own, see lorakit list")


def _steps(draft: Draft) -> None:
    """Intervals: in steps here, elsewhere also in epochs or parts of a run."""
    for what in ("save", "eval"):
        every, at = f"{what}_steps", {"save": ("save_strategy",), "eval": ("eval_strategy", "evaluation_strategy")}[what]
        key = next((key for key in at if key in draft.given), "")
        strategy = draft.get(key) if key else None
        if strategy in ("no", "none", False):
            draft.put(every, 0, key)
            if every in draft.given:
                draft.without_effect(every, f"{key} is {show(strategy)}")
            continue
        if strategy == "steps" and every not in draft.given and what == "eval":
            draft.put(
                "eval_steps", draft.get("logging_steps", draft.known("logging_steps") or 10), key, why="as often as the loss is logged"
            )
        elif strategy not in (None, "steps"):
            _in_epochs(draft, key, every)
        if every in draft.given and strategy in (None, "steps"):
            _interval(draft, every)
    if "logging_steps" in draft.given:
        _interval(draft, "logging_steps")


def _interval(draft: Draft, key: str) -> None:
    value = number(draft, key)
    if 0 < value < 1:
        _in_epochs(draft, key, key)
    else:
        draft.put(key, int(value) if value == int(value) else value, key)


def _in_epochs(draft: Draft, key: str, ours: str) -> None:
    """An interval that only the data decide: the run is the same, its checkpoints and evaluations are not."""
    patient = any(draft.known(name) for name in ("early_stopping_patience", "load_best_model_at_end"))
    if ours == "eval_steps" and patient:
        raise draft.refuse(key, "evaluations decide when to stop or which model is kept, and are counted in steps: give eval_steps")
    draft.without_effect(f"{key} {show(draft.get(key))}", f"intervals are counted in steps: give {ours}")


def per_epoch(draft: Draft, key: str, ours: str) -> None:
    """`saves_per_epoch` and the like."""
    if draft.get(key):
        _in_epochs(draft, key, ours)
    elif draft.get(key) == 0:
        draft.put(ours, 0, key)


def _warmup(draft: Draft) -> None:
    if "warmup_steps" in draft.given:
        steps = number(draft, "warmup_steps")
        draft.put("warmup_ratio" if 0 < steps < 1 else "warmup_steps", steps if 0 < steps < 1 else int(steps), "warmup_steps")


def _reports(draft: Draft) -> None:
    if "report_to" not in draft.given:
        return
    wanted = [name.lower() for name in words(draft.get("report_to"))]
    other = [name for name in wanted if name not in ("none", "all", "tensorboard", "wandb")]
    if other:
        draft.without_effect(f"report_to {', '.join(other)}", "trackers are tensorboard and wandb; report.html is always written")
    known = {name for name in wanted if name not in ("none", *other)}
    draft.put("report_to", "none" if not known else next(iter(known)) if len(known) == 1 else "all", "report_to")


def precision(draft: Draft, named: str | None = None) -> None:
    """dtype from bf16, fp16 and a dtype's name (`named`, e.g. torch_dtype)."""
    for key in ("fp16", "float16"):
        if draft.get(key) not in (None, False):
            raise draft.refuse(key, "half precision is bfloat16: use bf16: true (dtype: bfloat16), or leave both out for float32")
    name = str(draft.get(named)).removeprefix("torch.") if named and draft.get(named) is not None else None
    if name == "float16":
        raise draft.refuse(str(named), "half precision is bfloat16: use bfloat16, or float32")
    if name is not None and name != "auto":
        draft.put("dtype", name, str(named))
    for key in ("bf16", "bfloat16", "pure_bf16"):
        value = draft.get(key)
        if value in (True, "auto", "full") and draft.values.get("dtype") != "float32":
            why = "the base; adapters stay in fp32, for exact sums" if key == "pure_bf16" or value == "full" else ""
            draft.put("dtype", "bfloat16", key, why=why)
        elif value in (True, "auto", "full"):
            draft.without_effect(key, f"{named} keeps the base in float32, and it is computed in what it is stored in")
    if name == "auto" and "dtype" not in draft.values:
        draft.put("dtype", "bfloat16", str(named), why="what nearly all models are saved in")


def four_bits(draft: Draft, key: str, *, nested: bool, method: list[str]) -> None:
    """The base in NF4: with its scales quantized too, or not, which QLoRA as a method can say."""
    if nested:
        draft.put("quantize", "nf4", key)
    else:
        method.append("qlora")
        draft.put("double_quant", False, key, why="the base in NF4, its scales in fp32")


def loraplus(draft: Draft, parts: list[tuple[str, str]], args: dict[str, tuple[Any, str]]) -> None:
    """What LLaMA-Factory and axolotl call LoRA+'s keys."""
    if draft.get("loraplus_lr_ratio") is not None:
        parts.append(("loraplus", "loraplus_lr_ratio"))
        args["ratio"] = (number(draft, "loraplus_lr_ratio"), "loraplus_lr_ratio")
        if "loraplus_lr_embedding" in draft.given:
            args["embedding_lr"] = (number(draft, "loraplus_lr_embedding"), "loraplus_lr_embedding")


def choose_method(draft: Draft, parts: list[tuple[str, str]], args: Mapping[str, tuple[Any, str]], defaults: Mapping[str, Any]) -> None:
    """The method of several switches, `parts` (method, the key that asks for it), and its arguments (value, key); all in our words."""
    if parts:
        name = "+".join(dict.fromkeys(part for part, _ in parts))
        if "method" in draft.own and draft.own["method"] != name:
            raise BadParameter(f"method {draft.own['method']} and {parts[0][1]} ({name}) both choose the method; keep one")
        draft.values["method"] = name
        draft.sources["method"] = parts[0][1]
        draft.notes.append(f"{', '.join(dict.fromkeys(key for _, key in parts))} -> method {name}")
    for ours, (value, key) in args.items():
        draft.put(ours, value, key)
    if draft.known("init_adapter") is not None:
        return  # a saved adapter's parameters are its own
    known = describe(str(draft.known("method") or "lora")).parameters
    for ours, value in defaults.items():
        if ours in known:
            draft.default(ours, value)


def sites_of(value: Any) -> Any:
    """PEFT's target modules as our sites: `all`, a list of names, `a,b`, or a regular expression."""
    if isinstance(value, str) and value in ("all", "all-linear"):
        return "all-linear"
    if isinstance(value, str) and re.search(r"[*+?()\[\]|\\^$]", value):
        return f"re:{value}"
    names = words(value)
    if "all" in names or "all-linear" in names:
        return "all-linear"
    return names[0] if len(names) == 1 else names


def put_sources(draft: Draft, sources: list[Source], key: str) -> None:
    """train_data, data_format and columns of the training data."""
    if not sources:
        return
    twice = next((s.path for i, s in enumerate(sources) if s.path in [t.path for t in sources[:i]]), None)
    if twice is not None:
        raise BadParameter(f"{key} names {twice} twice; give it once")
    train: str | dict[str, float] = sources[0].path if len(sources) == 1 else {source.path: source.weight for source in sources}
    if draft.get(key) != train:
        draft.put("train_data", train, key, why="" if isinstance(train, str) else "a pass over each in an epoch")
    else:
        draft.put("train_data", train, key)
    kinds = {(source.format, tuple(sorted(source.columns.items()))) for source in sources}
    if len(kinds) == 1:
        ((kind, columns),) = kinds
        if kind != "auto":
            _say(draft, "data_format", kind, key)
        if columns:
            _say(draft, "columns", dict(columns), key)
    elif any(source.columns for source in sources):
        raise BadParameter(f"{key}: its data sets have columns of different names; give them the same, or train on one")
    else:
        draft.notes.append(f"{key}: formats of the data sets differ; each is recognized by its columns")


def _say(draft: Draft, ours: str, value: Any, key: str) -> None:
    draft.values[ours] = value
    draft.sources.setdefault(ours, key)
    draft.notes.append(f"{key} -> {ours} {show(value)}")


def named_template(draft: Draft, key: str, name: str, *, keep_own: bool) -> None:
    """A chat template by its name: the tokenizer's own one where it has one and the tool would not replace it, else one of ours."""
    from lorakit.train.model_facts import facts_of

    if keep_own and facts_of(str(draft.known("model") or "bundled")).chat_template:
        draft.without_effect(f"{key} {name}", "the tokenizer's own chat template is used")
    elif "{" in name or os.path.isfile(name):
        draft.put("chat_template", name, key)
    elif (ours := template_named(name)) is not None:
        draft.put("chat_template", ours, key)
    else:
        raise draft.refuse(key, f"give one of {', '.join(TEMPLATES)}, a Jinja file, or a model whose tokenizer has a chat template")


HELD = 100
"""Rows that are evaluated where nothing is held out."""


def hold_out(draft: Draft, key: str, fraction: float, *, held: Source | None = None, said: str = "") -> None:
    """The held-out side: a source, a fraction, or nothing, where all rows are trained on and the first of them are evaluated, too.

    One data_format and one set of columns hold for both sides.
    """
    if held is not None:
        kind, columns = draft.values.get("data_format", held.format), draft.values.get("columns", {})
        if held.format not in ("auto", kind) or dict(columns) != dict(held.columns):
            raise BadParameter(f"{said}: its rows have another format or other columns than those trained on; write them alike")
        draft.put("eval_data", held.path, said)
    elif fraction >= 1:
        raise draft.refuse(key, "a number of rows cannot be held out, a share can: give 0.1, or a file as eval_data")
    elif fraction > 0:
        draft.put("eval_fraction", fraction, key)
    elif draft.whole and not any(name in draft.own for name in ("eval_data", "eval_fraction", "max_eval_samples")):
        train = draft.known("train_data")
        first = next(iter(train), None) if isinstance(train, dict) else train
        if isinstance(first, str) and first:
            draft.values |= {"eval_data": first, "max_eval_samples": HELD}
            draft.notes.append(
                f"nothing is held out (as in {draft.dialect.title}): all rows are trained on, and the eval loss is that of up to {HELD} of "
                "them; give eval_fraction 0.1 for a held-out one"
            )


def hub_or_file(path: str, configuration: str | None = None) -> str:
    """A data set as tools name it: what exists here, or looks like a path, is local; anything else is of the Hub."""
    local = Path(os.path.expanduser(path))
    if os.path.exists(local) or path.startswith((".", "/", "~", "hf:", "builtin:")) or local.suffix in SUFFIXES:
        return path
    return f"hf:{path}:{configuration}" if configuration else f"hf:{path}"


SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
