"""The rows of a run: read from the configuration's sources, both sides of each."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lorakit.core.errors import DataError
from lorakit.data.lazy import Chain, LazyRows, place_of
from lorakit.data.mixture import mixed
from lorakit.data.row import Row, Shape, shape_of
from lorakit.data.source import Loaded, Reading, Skipped, load_source
from lorakit.data.tokenize import class_names
from lorakit.train.config import TrainConfig

TASKS: dict[Shape, str] = {
    "classify": "sequence-classification",
    "tag": "token-classification",
    "preference": "dpo",
    "feedback": "kto",
}
"""The task that a shape asks for; any other one is language modeling."""
NEEDS = {
    "sequence-classification": "{text, label} rows",
    "token-classification": "{tokens, tags} rows",
    "dpo": "{prompt, chosen, rejected} rows",
    "kto": "{prompt, completion, label: true or false} or {prompt, chosen, rejected} rows",
    "causal-lm": "text, chat or {prompt, completion} rows",
}
READING = ("data_format", "columns", "skip_bad", "eval_fraction")
"""Keys that say how a source is read and divided."""
LABELS: dict[str, Callable[[Row], Sequence[Any]]] = {
    "sequence-classification": lambda row: (row["label"],),
    "token-classification": lambda row: row["tags"],
}


@dataclass(frozen=True)
class Rows:
    """What the configuration's sources hold, before tokenizing: enough to choose a task and a model."""

    train: Sequence[Row]
    valid: Sequence[Row]
    known: tuple[Any, ...] = ()
    """Class names in the order of a trained model's outputs; () takes those of the rows."""
    notes: tuple[str, ...] = ()
    """What was recognized and why, how sources are mixed, which rows were left out: for the user to read."""
    skipped: tuple[Skipped, ...] = ()
    """Every row that was left out."""

    @property
    def task(self) -> str:
        """The task that the rows' shape asks for."""
        return TASKS.get(shape_of(self.train[0]), "causal-lm")

    @cached_property
    def labels(self) -> list[Any]:
        """Class names, [] for other tasks than classification."""
        if self.known or self.task not in LABELS:
            return list(self.known)
        of = LABELS[self.task]
        return list(class_names({"label": label} for side in (self.train, self.valid) for row in side for label in of(row)))


class Judged(LazyRows):
    """Preferences as feedback: each is a completion that is wanted and one that is not."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def row(self, i: int) -> Row:
        rest = dict(self.rows[i // 2])
        answers = rest.pop("chosen"), rest.pop("rejected")
        return rest | {"completion": answers[i % 2], "label": i % 2 == 0}

    def where(self, i: int) -> str:
        return place_of(self.rows, i // 2)


def read_tasks(config: TrainConfig) -> list[Rows]:
    """Both sides of every source, in order, with the same class names. Raises DataError."""
    tasks = [read_rows(config, *source) for source in config.sources]
    kinds = [rows.task for rows in tasks]
    if len(set(kinds)) > 1:
        raise DataError(f"tasks in sequence must be of one kind; found {', '.join(kinds)}")
    labels = Rows(Chain([rows.train for rows in tasks]), Chain([rows.valid for rows in tasks])).labels
    if len(labels) == 1:
        raise DataError(f"every row has the label {labels[0]!r}; expected at least two classes to tell apart")
    return [replace(rows, known=tuple(labels)) for rows in tasks]


def read_rows(config: TrainConfig, train_data: str | Mapping[str, float] | None = None, eval_data: str | None = None) -> Rows:
    """Load both sides of one source, by default the only one. Raises DataError."""
    if train_data is None:
        ((train_data, eval_data),) = config.sources
    if not train_data:
        raise DataError("no training data: give train_data (--train-data), e.g. data.jsonl, a folder, or builtin:email/code")
    loaded = _mixture(config, train_data, eval_data) if isinstance(train_data, Mapping) else _load(config, train_data, eval_data)
    train, valid = loaded.train[: config.max_train_samples], loaded.valid[: config.max_eval_samples]
    if config.task == "kto" and loaded.shape == "preference":
        train, valid = Judged(train), Judged(valid)
    rows = Rows(train, valid, notes=loaded.notes, skipped=loaded.skipped)
    if config.task not in ("auto", rows.task):
        names = ", ".join(train_data) if isinstance(train_data, Mapping) else train_data
        raise DataError(f"task={config.task} needs other rows: {names} holds {loaded.shape} data; expected {NEEDS[config.task]}")
    return rows


def remembered(config: TrainConfig) -> dict[str, Any]:
    """What an adapter's meta says of how its rows were read and divided, to be done so again: {reading, eval_data} as far as given."""
    usual = {key: TrainConfig.model_fields[key].get_default(call_default_factory=True) for key in READING}
    said = {key: getattr(config, key) for key in READING if getattr(config, key) != usual[key]}
    held = {"eval_data": config.model_dump(mode="json")["eval_data"]} if config.eval_data is not None else {}
    return ({"reading": said} if said else {}) | held


def recalled(meta: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keys that `remembered` left of a source; {} for another one than the adapter's own. What they hold is not checked."""

    def names(said: Any) -> set[str]:
        return {os.path.expanduser(one) for one in ([said] if isinstance(said, str) else said or ()) if isinstance(one, str)}

    own = names(meta.get("train_data")) | names(meta.get("eval_data"))
    said = meta.get("reading")
    if os.path.expanduser(source) not in own or not isinstance(said, Mapping):
        return {}
    return {key: said[key] for key in READING if key in said}


def _load(config: TrainConfig, source: str, eval_data: str | None) -> Loaded:
    reading = Reading(config.data_format, config.columns, config.skip_bad)
    loaded = load_source(source, valid=eval_data, valid_fraction=config.eval_fraction, seed=0, reading=reading)
    if source == eval_data and len(loaded.train) == len(loaded.valid) and loaded.train[0] == loaded.valid[0]:
        note = f"{source}: nothing is held out: these rows are trained on, and the eval loss is theirs; leave eval_data out for a split"
        return replace(loaded, notes=(*loaded.notes, note))
    return loaded


def _mixture(config: TrainConfig, weights: Mapping[str, float], eval_data: str | None) -> Loaded:
    """Several sources as one. Each is split by itself; held-out rows are not weighted, each of them is there once."""
    parts = {source: _load(config, source, eval_data) for source in weights}
    (first, one), *others = parts.items()
    for source, part in others:
        if part.shape != one.shape:
            raise DataError(f"mixed formats: {first} holds {one.shape} data and {source} {part.shape} data; expected one shape in all")
    train, shares = mixed({source: part.train for source, part in parts.items()}, weights, config.mix_strategy)
    valid = one.valid if eval_data is not None else Chain([part.valid for part in parts.values()])
    notes = dict.fromkeys((*(note for part in parts.values() for note in part.notes), *shares))
    skipped = dict.fromkeys(skip for part in parts.values() for skip in part.skipped)
    return Loaded(train, valid, one.shape, tuple(notes), tuple(skipped))
