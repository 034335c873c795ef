"""Datasets of the Hugging Face Hub, named `hf:<name>` or `hf:<name>:<configuration>`. Nothing is fetched unless so named.

A local folder in the Hub's layout works too (`hf:./my_dataset`) and needs no network.
"""

from typing import Any

from lorakit.core.errors import DataError, MissingExtra
from lorakit.data.records import Blocks, Records
from lorakit.data.tables import plain_columns

VALID_NAMES = ("validation", "valid", "dev")


def open_hub(name: str) -> dict[str, Records]:
    """The records of the split "train", and of the dataset's own validation split ("valid") where it has one."""
    splits = _load(name)
    if "train" not in splits:
        raise DataError(f"hf:{name} has no split called 'train'; it has {', '.join(map(repr, splits))}")
    valid = next((n for n in VALID_NAMES if n in splits), None)
    sides = {"train": _records(name, splits, "train")}
    return sides if valid is None else sides | {"valid": _records(name, splits, valid)}


def _records(name: str, splits: Any, split: str) -> Records:
    if not len(splits[split]):
        raise DataError(f"hf:{name} holds no rows in its split {split!r}")
    return HubRows(splits[split], f"hf:{name}, {split}")


class HubRows(Blocks):
    """The rows of one split, which the library maps into memory."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name
        if hasattr(rows, "features"):
            kept, dropped = plain_columns(rows.features.arrow_schema)
            if dropped:
                self.notes = (f"{name}: columns left out, as they hold neither text nor numbers: {', '.join(dropped)}",)
            self.rows = rows.select_columns(kept).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, start: int, size: int) -> list[Any]:
        found = self.rows[start : start + size]
        return found if isinstance(found, list) else found.to_pylist()

    def where(self, i: int) -> str:
        return f"{self.name} row {i + 1}"


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
