"""Datasets of the Hugging Face Hub, named `hf:<name>` or `hf:<name>:<configuration>`. Nothing is fetched unless so named.

A local folder in the Hub's layout works too (`hf:./my_dataset`) and needs no network.
"""

from typing import Any

from lorakit.core.errors import DataError, MissingExtra
from lorakit.data.row import Row, check_rows

VALID_NAMES = ("validation", "valid", "dev")


def read_hub(name: str) -> tuple[list[Row], list[Row] | None]:
    """The rows of the split "train", and those of the dataset's own validation split where it has one."""
    splits = _load(name)
    if "train" not in splits:
        raise DataError(f"hf:{name} has no split called 'train'; it has {', '.join(map(repr, splits))}")
    valid = next((n for n in VALID_NAMES if n in splits), None)
    return _rows(name, splits, "train"), _rows(name, splits, valid) if valid else None


def _rows(name: str, splits: Any, split: str) -> list[Row]:
    rows = check_rows((f"hf:{name}, {split} row {i}", dict(row)) for i, row in enumerate(splits[split], 1))
    if not rows:
        raise DataError(f"hf:{name} holds no rows in its split {split!r}")
    return rows


def _load(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "data") from None
    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises many kinds; one line names the cause
        cause = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise DataError(
            f"hf:{name} could not be loaded ({type(error).__name__}: {cause}); check the name, the configuration and the network"
        ) from error
