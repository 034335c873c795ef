"""One flat configuration: the keys of a YAML file are the flags of `lorakit train`.

Names are Transformers' TrainingArguments' where they exist. A method's own parameters (r, alpha, sites, …) stand beside them, checked
against the method's signature. An unknown key is an error that names the nearest.
"""

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from lorakit.core.checked import expected
from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.core.method import Method, describe, get_method
from lorakit.train.chat_templates import TEMPLATES
from lorakit.train.config_file import check_finite, read_mapping
from lorakit.train.dialects.rule import plain

BUNDLED = "bundled"
Weight = Annotated[float, Field(gt=0)]
"""How much of a source, see mix_strategy."""


class TrainConfig(pydantic.BaseModel):
    """Everything a run depends on. Lengths in tokens, sizes in items, steps are optimizer steps."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(BUNDLED, description="a local folder, a Hub name, or 'bundled'")
    method: str = Field("lora", description="any id of `lorakit list`; its parameters are keys too")
    init_adapter: str | None = Field(
        None, description="a saved adapter (lorakit's or PEFT's folder) to start from; method and its parameters are then the adapter's own"
    )
    train_data: str | tuple[str, ...] | dict[str, Weight] = Field(
        "",
        description="a file (JSONL, JSON, CSV, Parquet, Arrow, text), folder, builtin:<task>/<kind>, or hf:<name>; "
        "a list: tasks in sequence; {source: weight}: several in one",
    )
    eval_data: str | tuple[str, ...] | None = Field(None, description="as train_data; None: a split of train_data")
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="of train_data that is held out where eval_data is None")
    mix_strategy: Literal["passes", "under", "over"] = Field(
        "passes",
        description="what the weights of several sources are: passes over each in an epoch; or shares of an epoch, "
        "which ends when the first is used up (under) or the last (over)",
    )
    data_format: Literal["auto", "text", "chat", "pair", "classify", "tag", "preference", "feedback", "alpaca", "sharegpt"] = Field(
        "auto", description="what the rows are; auto: recognized by their columns, and the reason printed"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our names: the file's, e.g. {prompt: question, completion: answer}")
    skip_bad: bool = Field(False, description="leave out rows that cannot be used, counted and listed; off: the first is an error")
    preprocessing_num_workers: int | None = Field(
        None, ge=1, le=1024, description="processes that tokenize; None: by the number of rows and cores"
    )
    output_dir: str = Field("out", description="run folder: checkpoints, metrics, curve, adapter")
    task: Literal["auto", "causal-lm", "sequence-classification", "token-classification", "dpo", "kto"] = Field(
        "auto", description="auto: by the rows' shape; an encoder-decoder model makes causal-lm sequence to sequence"
    )
    beta: float = Field(0.1, gt=0, le=1000, description="of DPO and KTO: how far the model may go from the base")
    desirable_weight: float = Field(1.0, ge=0, le=1000, description="KTO's, of rows labeled true")
    undesirable_weight: float = Field(1.0, ge=0, le=1000, description="KTO's, of rows labeled false")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen base; adapters are fp32")
    quantize: Literal["none", "nf4"] = Field("none", description="how the frozen linear weights are stored, for any method")
    max_length: int = Field(512, ge=2, le=10_000_000, description="longest sample, and the packing window")
    packing: bool = Field(True, description="several documents in a window, exactly; off: pad")
    group_by_length: bool = Field(True, description="items of similar length share a batch, in random order: little is padded")
    train_on: Literal["assistant", "all", "last"] = Field(
        "assistant", description="what is learned of a chat: the assistant's turns, the last of them, or all; all: a pair's prompt, too"
    )
    chat_template: str | None = Field(
        None, description="in place of the tokenizer's own: a Jinja template, a file with one, or a name (chatml, llama3, plain, …)"
    )
    max_train_samples: int | None = Field(None, ge=1, description="use only the first rows")
    max_eval_samples: int | None = Field(None, ge=1, description="use only the first rows")
    seed: int = Field(0, ge=0, lt=2**63, description="of init, data order and dropout")
    per_device_train_batch_size: int = Field(8, ge=1, le=1_000_000, description="windows or samples")
    per_device_eval_batch_size: int = Field(8, ge=1, le=1_000_000, description="windows or samples")
    gradient_accumulation_steps: int = Field(1, ge=1, le=1_000_000, description="micro-batches in a step; exact for uneven token counts")
    learning_rate: float = Field(2e-4, gt=0, le=10, description="peak rate; methods may multiply it by role")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's, on every trained parameter")
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    num_train_epochs: float = Field(1.0, gt=0, le=100_000, description="passes over the training items; may be a fraction")
    max_steps: int = Field(-1, ge=-1, le=10**9, description="overrides num_train_epochs when positive")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = Field(
        "cosine", description="of every group, times its own rate"
    )
    warmup_steps: int = Field(0, ge=0, description="linear, from 0")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="of all steps, when warmup_steps is 0")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, same bits")
    torch_compile: Literal["auto"] | bool = Field("auto", description="compile the layers; auto: where an estimate says that it pays")
    logging_steps: int = Field(10, ge=1, description="between two rows of metrics.jsonl")
    eval_steps: int = Field(0, ge=0, description="0: at the end only")
    save_steps: int = Field(100, ge=0, description="0: no checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    load_best_model_at_end: bool = Field(False, description="the final adapter is the one with the lowest eval loss")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without a better eval loss")
    resume: Literal["auto"] | None = Field(None, description="'auto': continue from the newest checkpoint in output_dir, if any")
    report_to: Literal["none", "tensorboard", "wandb", "all"] = Field("none", description="trackers through Accelerate")
    run_name: str | None = Field(None, description="as reports and trackers call it; None: the name of output_dir")
    report_samples: int = Field(3, ge=0, description="held-out prompts that report.html answers before and after training")
    method_args: dict[str, Any] = Field(default_factory=dict, description="the method's own parameters (given flat, beside the other keys)")

    @property
    def sources(self) -> list[tuple[str | dict[str, float], str | None]]:
        """(train_data, eval_data) of each task. Raises BadParameter."""
        train = self.train_data if isinstance(self.train_data, tuple) else (self.train_data,)
        valid = (self.eval_data,) if self.eval_data is None or isinstance(self.eval_data, str) else self.eval_data
        if self.eval_data is not None and len(valid) != len(train):
            raise BadParameter(f"{len(train)} sources in train_data and {len(valid)} in eval_data; give one for each task, or none")
        if len(train) > 1 and (self.load_best_model_at_end or self.early_stopping_patience):
            raise BadParameter("load_best_model_at_end and early_stopping_patience judge one task; leave them out for tasks in sequence")
        return list(zip(train, valid * len(train) if self.eval_data is None else valid, strict=True))

    def build_method(self) -> Method:
        """The method with its parameters. Raises BadParameter or NoSuchMethod."""
        return get_method(self.method, **self.method_args)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        return self.model_dump(mode="json", exclude=set(FREE))


FREE = (
    "resume", "output_dir", "logging_steps", "save_total_limit", "torch_compile", "preprocessing_num_workers", "report_to", "run_name",
    "report_samples",
)  # fmt: skip
"""Keys that do not decide what is learned: a resumed run may change them."""

EVERYDAY = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "rank": "r", "data": "train_data", "train_file": "train_data",
    "steps": "max_steps",
    "output": "output_dir", "out": "output_dir", "target": "sites", "targets": "sites", "target_modules": "sites",
    "bs": "per_device_train_batch_size",
    "scheduler": "lr_scheduler_type", "wd": "weight_decay", "validation_file": "eval_data",
    "device": "CUDA_VISIBLE_DEVICES (in the environment)",
}  # fmt: skip
"""Words that nobody's configuration has and many type."""

FIELDS = tuple(name for name in TrainConfig.model_fields if name != "method_args")


PRESET = "a family's keys under yours: a name of lorakit presets, or auto, by the model's type"
"""What the key `preset` means. It is none of a run's: what it says becomes the run's own keys."""


@dataclass(frozen=True)
class Resolved:
    """A configuration, and what was understood, changed or left without effect on the way to it, a line each."""

    config: TrainConfig
    notes: tuple[str, ...] = ()


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from flat keys of ours, the method's among them. Raises BadParameter with one line for the first thing wrong."""
    return resolve_config({}, values).config


def read_config(path: str | Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """A YAML or JSON file's keys, overridden by flags; both may be in another tool's words."""
    return load_config(path, overrides).config


def load_config(path: str | Path | None, overrides: Mapping[str, Any]) -> Resolved:
    """As `read_config`, with what is to be said of it."""
    return resolve_config({} if path is None else read_mapping(path), overrides)


def resolve_config(file: Mapping[str, Any], flags: Mapping[str, Any]) -> Resolved:
    """From what was written to what runs. What decides, first to last: flags, file, preset, the defaults of the file's dialect, ours."""
    from lorakit.train.dialects.translate import translate

    check_finite(dict(file))
    check_finite(dict(flags))
    named = next((v for v in (flags.get("method"), file.get("method")) if v is not None), "lora")
    if not isinstance(named, str):
        raise BadParameter(f"method={named!r} is no name; lorakit list shows them")
    translated = translate(file, flags, {*FIELDS, "method_args", "preset", *describe(named).parameters})
    values, notes = dict(translated.values), list(translated.notes)
    if (preset := values.pop("preset", None)) is not None:
        from lorakit.train.preset import under

        method = str(values.get("method", translated.defaults.get("method", "lora")))
        open_, said = under(preset, values, describe(method).parameters)
        values, notes = open_ | values, notes + said
    config = _checked({**translated.defaults, **values})
    return Resolved(config, tuple(notes))


def _checked(values: dict[str, Any]) -> TrainConfig:
    entry = describe(values.get("method", "lora"))
    own = {k: v for k, v in values.items() if k in FIELDS}
    method_args = values.get("method_args", {})
    if not isinstance(method_args, dict):
        raise BadParameter(f"method_args={method_args!r} is no mapping of the method's parameters; give them beside the other keys")
    method_args = dict(method_args) | {k: v for k, v in values.items() if k in entry.parameters}
    for key, value in method_args.items():  # a number in quotes is that number, as it is for every other key
        if isinstance(value, str) and type(entry.parameters[key].default if key in entry.parameters else "") in (int, float):
            method_args[key] = plain(value)
            if value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):  # which Python reads as numbers
                raise BadParameter(f"{key}={value!r}: expected a finite number")
    for key in values:
        if key not in FIELDS and key not in entry.parameters and key != "method_args":
            raise BadParameter(f"unknown key {key!r} (method {entry.name}). {nearest_key(key, entry.parameters)}")
    for key, value in own.items():
        if isinstance(value, bool) and _counts(key):
            raise BadParameter(f"{key}={str(value).lower()}: expected a number ({TrainConfig.model_fields[key].description})")
    if isinstance(own.get("chat_template"), str):
        own["chat_template"] = TEMPLATES.get(own["chat_template"], own["chat_template"])
    try:
        config = TrainConfig(**own, method_args=method_args)
    except pydantic.ValidationError as error:
        raise BadParameter(_first(error)) from None
    config.build_method(), config.sources
    return config


def nearest_key(key: str, parameters: Mapping[str, Any]) -> str:
    """The nearest of our names, else of the other tools'."""
    from lorakit.train.dialects.translate import DIALECTS

    if key in EVERYDAY:
        return f"Did you mean {EVERYDAY[key]!r}?"
    ours, theirs = [*FIELDS, "preset", *parameters], {name: dialect.title for dialect in DIALECTS for name in dialect.keys}
    best = difflib.get_close_matches(key, sorted({*ours, *theirs}), n=1, cutoff=0.8)
    if best and best[0] not in ours:
        return f"Did you mean {best[0]!r} ({theirs[best[0]]}'s)?"
    return did_you_mean(key, ours) or "lorakit train --keys lists them."


def _counts(key: str) -> bool:
    """Whether a key holds a number, and true would be read as 1."""
    kinds = str(TrainConfig.model_fields[key].annotation)
    return ("int" in kinds or "float" in kinds) and "bool" not in kinds


def _first(error: pydantic.ValidationError) -> str:
    """One line for the first thing wrong: what was found, what was expected, what the key is."""
    errors = error.errors()
    name = str(errors[0]["loc"][0])
    info = TrainConfig.model_fields[name]
    kinds = [kind for kind in typing.get_args(info.annotation) if kind is not type(None)] if _is_union(info.annotation) else []
    errors = [one for one in errors if one["loc"][0] == name]  # one for each kind that the key may be
    deepest = max(len(one["loc"]) for one in errors)
    errors = [one for one in errors if len(one["loc"]) == deepest]
    where = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in errors[0]["loc"][1 + (len(kinds) > 1) :])
    found = repr(errors[0]["input"])
    about = f" ({info.description}; default {info.get_default(call_default_factory=True)!r})"
    wanted = " or ".join(dict.fromkeys(map(expected, errors)))
    return f"{name}{where}={found if len(found) <= 80 else found[:77] + '…'}: expected {wanted}{about}"


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
