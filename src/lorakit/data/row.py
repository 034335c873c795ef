"""A row: one example as it was read, a plain dict in one of four shapes.

text      {"text"}                          continued language modeling
chat      {"messages": [{"role", "content"}, ..]}
pair      {"prompt", "completion"}          loss on the completion alone
classify  {"text", "label"}                 label: a string or an integer
Other keys may stand beside these; they are kept and ignored, but for `kind`, an integer from 0 on: which kind of sample the row is, for
methods that tell kinds apart. It counts where every row has one.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal, get_args

from lorakit.core.errors import DataError

Row = dict[str, Any]
Shape = Literal["text", "chat", "pair", "classify"]

KEYS: dict[Shape, tuple[str, ...]] = {
    "chat": ("messages",),
    "pair": ("prompt", "completion"),
    "classify": ("text", "label"),
    "text": ("text",),
}
EXPECTED = "{text}, {messages}, {prompt, completion} or {text, label}"


def shape_of(row: Row, *, where: str = "row 1") -> Shape:
    """The one shape whose keys the row has; DataError naming the keys found when there is none or more than one."""
    found: list[Shape] = [shape for shape, keys in KEYS.items() if all(key in row for key in keys)]
    if "classify" in found:
        found.remove("text")
    if len(found) != 1:
        what = "keys of two kinds of data" if found else "no known set of keys"
        raise DataError(f"{where} has {what}: {_names(row)}; expected {EXPECTED}")
    return found[0]


def check_rows(rows: Iterable[tuple[str, Row]]) -> list[Row]:
    """The rows, once all have the first one's shape and usable values; `rows` yields (where, row), and where is named in errors."""
    checked: list[Row] = []
    shape: Shape | None = None
    for where, row in rows:
        shape = shape or shape_of(row, where=where)
        missing = [key for key in KEYS[shape] if key not in row]
        if missing or (shape == "text" and "label" in row):
            raise DataError(
                f"{where} has the keys {_names(row)}, but the first row makes this {shape} data: expected {_braces(KEYS[shape])}"
            )
        _check_values(row, shape, where)
        checked.append(row)
    return checked


def kind_of(row: Row) -> int | None:
    """The row's kind of sample; None where it names none."""
    kind = row.get("kind")
    return kind if type(kind) is int and kind >= 0 else None


def data_hash(rows: Iterable[Row]) -> str:
    """sha256 of the rows in order, whatever the order of their keys; the same on every machine."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical(row).encode() + b"\n")
    return digest.hexdigest()


def canonical(row: Row) -> str:
    """The row as one line of JSON with sorted keys."""
    return json.dumps(row, sort_keys=True, separators=(",", ":"))


def _check_values(row: Row, shape: Shape, where: str) -> None:
    if shape == "chat":
        _check_messages(row["messages"], where)
        return
    for key in KEYS[shape]:
        if key == "label":
            _check_label(row[key], where)
        else:
            _check_text(row[key], f"{where}: {key!r}", empty=key == "prompt")


def _check_text(value: Any, where: str, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_kind(value)}; expected a string")
    if not value and not empty:
        raise DataError(f"{where} is empty; leave the row out or give it text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a surrogate pair ({value[error.start]!a}), which is not text; remove it") from None


def _check_label(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: 'label' is {_kind(value)}; expected a string or an integer")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is {_kind(messages)}; expected a list of at least one {{role, content}}")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = _names(message) if isinstance(message, dict) else _kind(message)
            raise DataError(f"{where}: message {i} has {keys}; expected {{role, content}}")
        _check_text(message["role"], f"{where}: message {i}: 'role'")
        _check_text(message["content"], f"{where}: message {i}: 'content'", empty=True)


def _names(row: Row) -> str:
    return _braces(sorted(map(str, row)))


def _braces(keys: Iterable[str]) -> str:
    return "{" + ", ".join(keys) + "}"


def _kind(value: Any) -> str:
    return "missing" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"


assert set(KEYS) == set(get_args(Shape))
