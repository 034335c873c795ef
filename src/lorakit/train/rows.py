"""The rows of a run: read from the configuration's sources, both sides of each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorakit.core.errors import DataError
from lorakit.data.row import Row, shape_of
from lorakit.data.source import load_rows
from lorakit.data.tokenize import class_names
from lorakit.train.config import TrainConfig


@dataclass(frozen=True)
class Rows:
    """What the configuration's sources hold, before tokenizing: enough to choose a task and a model."""

    train: list[Row]
    valid: list[Row]
    known: tuple[Any, ...] = ()
    """Class names in the order of a trained model's outputs; () takes those of the rows."""

    @property
    def task(self) -> str:
        """The task that the rows' shape asks for."""
        return "sequence-classification" if shape_of(self.train[0]) == "classify" else "causal-lm"

    @property
    def labels(self) -> list[Any]:
        """Class names, [] for language modeling."""
        if self.known:
            return list(self.known)
        return class_names([*self.train, *self.valid]) if self.task == "sequence-classification" else []


def read_tasks(config: TrainConfig) -> list[Rows]:
    """Both sides of every source, in order, with the same class names. Raises DataError."""
    tasks = [read_rows(config, *source) for source in config.sources]
    kinds = [rows.task for rows in tasks]
    if len(set(kinds)) > 1:
        raise DataError(f"tasks in sequence must be of one kind; found {', '.join(kinds)}")
    labels = Rows([r for rows in tasks for r in rows.train], [r for rows in tasks for r in rows.valid]).labels
    return [replace(rows, known=tuple(labels)) for rows in tasks]


def read_rows(config: TrainConfig, train_data: str | Mapping[str, float] | None = None, eval_data: str | None = None) -> Rows:
    """Load both sides of one source, by default the only one. Raises DataError."""
    if train_data is None:
        ((train_data, eval_data),) = config.sources
    if not train_data:
        raise DataError("no training data: give train_data (--train-data), e.g. data.jsonl, a folder, or builtin:email/code")
    sides: dict[str, list[Row]] = {}
    limits = {"train": config.max_train_samples, "valid": config.max_eval_samples}
    for split in ("train", "valid"):
        sides[split] = load_rows(train_data, split, valid=eval_data, seed=0)[: limits[split]]
    rows = Rows(sides["train"], sides["valid"])
    if config.task not in ("auto", rows.task):
        raise DataError(f"task={config.task} needs other rows: {train_data} holds {shape_of(rows.train[0])} data")
    return rows
