"""Figures of an opened model on data: loss, bits per byte, accuracy, F1, and exact match of generated answers."""

from typing import Any

from lorakit.core.errors import DataError
from lorakit.data.packable import why_not_packable
from lorakit.data.row import Row, shape_of
from lorakit.data.source import load_rows
from lorakit.serve.generate import stream, stream_chat
from lorakit.serve.open import Opened
from lorakit.train.config import make_config
from lorakit.train.dataset import TrainData, prepare
from lorakit.train.evaluate import evaluate
from lorakit.train.metrics import exact_match
from lorakit.train.rows import Rows
from lorakit.train.source_model import CLASSIFY


def score(
    opened: Opened,
    data: str,
    *,
    whole: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    exact: bool = False,
) -> dict[str, float]:
    """Figures on the validation side of `data` (all of it with `whole`). Raises DataError."""
    sides = prepared(opened, data, whole=whole, limit=limit, max_length=max_length)
    figures = evaluate(opened.model, sides.valid, batch_size=batch_size)
    return figures | ({"exact_match": answers(opened, _rows(data, whole, limit))} if exact else {})


def prepared(opened: Opened, data: str, *, whole: bool = False, limit: int | None = None, max_length: int | None = None) -> TrainData:
    """The validation side of `data`, on both sides, tokenized for this model. Raises DataError for data of another kind."""
    rows = _rows(data, whole, limit)
    config = make_config({"train_data": data, "max_length": max_length or opened.meta.get("max_length", 512)})
    model: Any = opened.model
    both = Rows(rows, rows, tuple(opened.meta.get("labels") or ()))
    if (both.task == CLASSIFY) == bool(model.can_generate()):
        kind = "language model" if model.can_generate() else "classifier"
        raise DataError(f"this is a {kind}, and {data} holds {shape_of(rows[0])} data, which it cannot be scored on")
    packing = both.task == "causal-lm" and why_not_packable(model) is None
    return prepare(both, config, opened.tokenizer, packing=packing, encoder_decoder=bool(model.config.is_encoder_decoder))


def _rows(data: str, whole: bool, limit: int | None) -> list[Row]:
    return load_rows(data, "valid", valid=data if whole else None)[:limit]


def answers(opened: Opened, rows: list[Row]) -> float:
    """Share of rows whose greedy answer equals the reference."""
    shape = shape_of(rows[0])
    if shape not in ("chat", "pair"):
        raise DataError(f"exact match needs chat or prompt/completion rows; these are {shape} data")
    predictions, references = [], []
    for row in rows:
        if shape == "chat":
            *before, last = row["messages"]
            made, reference = stream_chat(opened, list(before)), last["content"]
        else:
            made, reference = stream(opened, row["prompt"]), row["completion"]
        predictions.append("".join(made))
        references.append(reference)
    return exact_match(predictions, references)
