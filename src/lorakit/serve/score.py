"""Figures of an opened model on data: loss, bits per byte, accuracy, F1, and exact match of generated answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.adapters.digest import digest
from lorakit.adapters.io import load_adapter
from lorakit.core.errors import DataError
from lorakit.data.packable import why_not_packable
from lorakit.data.row import Row, shape_of
from lorakit.data.source import load_rows
from lorakit.serve.generate import stream, stream_chat
from lorakit.serve.open import Opened
from lorakit.train.config import TrainConfig, make_config
from lorakit.train.dataset import TrainData, prepare
from lorakit.train.evaluate import evaluate
from lorakit.train.metrics import exact_match
from lorakit.train.preference import REFERENCE
from lorakit.train.rows import Judged, Rows, recalled
from lorakit.train.source_model import CLASSIFY, HEADED, TAG


def score(
    opened: Opened,
    data: str,
    *,
    whole: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    exact: bool = False,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Figures on the validation side of `data` (all of it with `whole`). Raises DataError. `reading`: see `prepared`."""
    sides = prepared(opened, data, whole=whole, limit=limit, max_length=max_length, compared=True, reading=reading)
    if sides.valid.aim is not None:
        _refer(opened)
    figures = evaluate(opened.model, sides.valid, batch_size=batch_size, adapted=opened.adapted)
    return figures | ({"exact_match": answers(opened, _rows(opened, _config(opened, data, reading), whole, limit))} if exact else {})


def _refer(opened: Opened) -> None:
    """Load what an adapter was compared with when it learned preferences, where that was another adapter. Raises DataError."""
    begun = opened.meta.get("init_adapter") if "aim" in opened.meta else None
    if begun is None or opened.adapted is None or REFERENCE in opened.adapted.methods:
        return
    folder = begun["folder"]
    if not Path(folder).is_dir() or digest(load_adapter(folder, model=opened.model).tensors) != begun["sha256"]:
        raise DataError(f"this adapter learned preferences beside {folder}, which is not there any more; bring it back")
    opened.adapted.load(folder, REFERENCE).switch("default")


def prepared(
    opened: Opened,
    data: str,
    *,
    whole: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    compared: bool = False,
    reading: Mapping[str, Any] | None = None,
) -> TrainData:
    """The validation side of `data`, on both sides, tokenized for this model. Raises DataError for data of another kind.

    `compared`: it may hold preferences, which are judged beside the base. `reading`: how rows are read and divided (rows.READING); what it
    does not say is as it was in training where the source is the same, so that the rows held out there are those held out here.
    """
    config = _config(opened, data, reading, max_length)
    rows = _rows(opened, config, whole, limit)
    model: Any = opened.model
    both = Rows(rows, rows, tuple(opened.meta.get("labels") or ()))
    if both.task != opened.task and {both.task, opened.task} & set(HEADED):
        kind = {CLASSIFY: "classifier", TAG: "token classifier"}.get(opened.task, "language model")
        raise DataError(f"this is a {kind}, and {data} holds {shape_of(rows[0])} data, which it cannot be scored on")
    if both.task in ("dpo", "kto") and not compared:
        raise DataError(f"{data} holds {shape_of(rows[0])} data, on which only `lorakit eval` of one adapter says something")
    packing = both.task == "causal-lm" and why_not_packable(model) is None
    return prepare(both, config, opened.tokenizer, packing=packing, encoder_decoder=bool(model.config.is_encoder_decoder))


def _config(opened: Opened, data: str, reading: Mapping[str, Any] | None, max_length: int | None = None) -> TrainConfig:
    length = max_length or opened.meta.get("max_length", 512)
    keys = {**recalled(opened.meta, data), **(reading or {})}
    return make_config({"train_data": data, "max_length": length, **opened.meta.get("aim", {}), **keys})


def _rows(opened: Opened, config: TrainConfig, whole: bool, limit: int | None) -> list[Row]:
    data = str(config.train_data)
    rows: Sequence[Row] = load_rows(
        data,
        "valid",
        valid=data if whole else None,
        valid_fraction=config.eval_fraction,
        data_format=config.data_format,
        columns=config.columns,
        skip_bad=config.skip_bad,
    )[:limit]
    return list(Judged(rows) if opened.task == "kto" and shape_of(rows[0]) == "preference" else rows)


def answers(opened: Opened, rows: list[Row]) -> float:
    """Share of rows whose greedy answer equals the reference."""
    shape = shape_of(rows[0])
    if shape not in ("chat", "pair"):
        raise DataError(f"exact match needs chat or prompt/completion rows; these are {shape} data")
    predictions, references = [], []
    for row in rows:
        if shape == "chat":
            *before, last = row["messages"]
            made, reference = stream_chat(opened, before, tools=row.get("tools")), last["content"]
        else:
            made, reference = stream(opened, row["prompt"]), row["completion"]
        predictions.append("".join(made))
        references.append(reference)
    return exact_match(predictions, references)
