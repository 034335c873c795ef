"""One flat configuration: the keys of a YAML file are the flags of `lorakit train`.

Names are Transformers' TrainingArguments' where they exist. A method's own parameters (r, alpha, sites, …) stand beside them, checked
against the method's signature. An unknown key is an error that names the nearest.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field

from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.core.method import Method, describe, get_method

BUNDLED = "bundled"


class TrainConfig(pydantic.BaseModel):
    """Everything a run depends on. Lengths in tokens, sizes in items, steps are optimizer steps."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(BUNDLED, description="a local folder, a Hub name, or 'bundled'")
    method: str = Field("lora", description="any id of `lorakit list`; its parameters are keys too")
    init_adapter: str | None = Field(
        None, description="a saved adapter (lorakit's or PEFT's folder) to start from; method and its parameters are then the adapter's own"
    )
    train_data: str | tuple[str, ...] | dict[str, float] = Field(
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
    preprocessing_num_workers: int | None = Field(None, ge=1, description="processes that tokenize; None: by the number of rows and cores")
    output_dir: str = Field("out", description="run folder: checkpoints, metrics, curve, adapter")
    task: Literal["auto", "causal-lm", "sequence-classification", "token-classification", "dpo", "kto"] = Field(
        "auto", description="auto: by the rows' shape; an encoder-decoder model makes causal-lm sequence to sequence"
    )
    beta: float = Field(0.1, gt=0, description="of DPO and KTO: how far the model may go from the base")
    desirable_weight: float = Field(1.0, ge=0, description="KTO's, of rows labeled true")
    undesirable_weight: float = Field(1.0, ge=0, description="KTO's, of rows labeled false")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen base; adapters are fp32")
    quantize: Literal["none", "nf4"] = Field("none", description="how the frozen linear weights are stored, for any method")
    max_length: int = Field(512, ge=2, description="longest sample, and the packing window")
    packing: bool = Field(True, description="several documents in a window, exactly; off: pad")
    group_by_length: bool = Field(True, description="items of similar length share a batch, in random order: little is padded")
    train_on: Literal["assistant", "all"] = Field("assistant", description="which tokens of a chat are trained on")
    chat_template: str | None = Field(None, description="a Jinja template (or a file with one) for a tokenizer without")
    max_train_samples: int | None = Field(None, ge=1, description="use only the first rows")
    max_eval_samples: int | None = Field(None, ge=1, description="use only the first rows")
    seed: int = Field(0, ge=0, description="of init, data order and dropout")
    per_device_train_batch_size: int = Field(8, ge=1, description="windows or samples")
    per_device_eval_batch_size: int = Field(8, ge=1, description="windows or samples")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches in a step; exact for uneven token counts")
    learning_rate: float = Field(2e-4, gt=0, description="peak rate; methods may multiply it by role")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, on every trained parameter")
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the training items; may be a fraction")
    max_steps: int = Field(-1, description="overrides num_train_epochs when positive")
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

FIELDS = tuple(name for name in TrainConfig.model_fields if name != "method_args")


def make_config(values: dict[str, Any]) -> TrainConfig:
    """A configuration from flat keys, the method's among them. Raises BadParameter with one line for the first thing wrong."""
    entry = describe(values.get("method", "lora"))
    own = {k: v for k, v in values.items() if k in FIELDS}
    method_args = dict(values.get("method_args", {})) | {k: v for k, v in values.items() if k in entry.parameters}
    for key in values:
        if key not in FIELDS and key not in entry.parameters and key != "method_args":
            options = [*FIELDS, *entry.parameters]
            hint = did_you_mean(key, options) or "lorakit train --keys lists them."
            raise BadParameter(f"unknown key {key!r} (method {entry.name}). {hint}")
    try:
        config = TrainConfig(**own, method_args=method_args)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise BadParameter(f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}") from None
    config.build_method(), config.sources
    return config


def read_config(path: str | Path | None, overrides: dict[str, Any]) -> TrainConfig:
    """A YAML file's keys, overridden by flags."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.safe_load(text) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadParameter(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise BadParameter(f"{path} is not a flat mapping of keys to values")
        node = yaml.compose(text)
        keys = Counter(key.value for key, _ in node.value) if isinstance(node, yaml.MappingNode) else Counter()
        twice = [key for key, n in keys.items() if n > 1]
        if twice:
            raise BadParameter(f"{path} gives {twice[0]!r} twice; keep one")
    return make_config(values | overrides)
