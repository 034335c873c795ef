"""A row: one example, a plain dict in one of seven shapes. What files hold is brought into them by `recognize`.

text        {"text"}                          continued language modeling
chat        {"messages": [{"role", "content"}, ..]}; a message with "train": false is not learned
pair        {"prompt", "completion"}          loss on the completion alone
classify    {"text", "label"}                 label: a string or an integer
tag         {"tokens", "tags"}                lists of one length: words, and a string or an integer for each
preference  {"prompt", "chosen", "rejected"}  all three strings, or all three lists of messages
feedback    {"prompt", "completion", "label"} label: true or false; the others both strings, or both lists of messages
Other keys may stand beside these; they are kept and ignored, but for `kind`, an integer from 0 on: which kind of sample the row is, for
methods that tell kinds apart. It counts where every row has one.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal, get_args

from lorakit.core.errors import DataError

Row = dict[str, Any]
Shape = Literal["text", "chat", "pair", "classify", "tag", "preference", "feedback"]

KEYS: dict[Shape, tuple[str, ...]] = {
    "chat": ("messages",),
    "pair": ("prompt", "completion"),
    "classify": ("text", "label"),
    "tag": ("tokens", "tags"),
    "preference": ("prompt", "chosen", "rejected"),
    "feedback": ("prompt", "completion", "label"),
    "text": ("text",),
}
EXPECTED = (
    "{text}, {messages}, {prompt, completion}, {text, label}, {tokens, tags}, {prompt, chosen, rejected} or {prompt, completion, label}"
)
PART_OF: dict[Shape, Shape] = {"text": "classify", "pair": "feedback"}
"""Shapes whose keys are among another's: a row that has all of the larger one's is of that."""


def shape_of(row: Row, *, where: str = "row 1") -> Shape:
    """The one shape whose keys the row has; DataError naming the keys found when there is none or more than one."""
    fits: list[Shape] = [shape for shape, keys in KEYS.items() if all(key in row for key in keys)]
    if not isinstance(row.get("label"), bool) and "feedback" in fits:  # a pair with some other label beside it
        fits.remove("feedback")
    found = [shape for shape in fits if PART_OF.get(shape) not in fits]
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
        if missing or (shape in PART_OF and shape_of(row, where=where) == PART_OF[shape]):
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
    if shape == "tag":
        _check_tags(row["tokens"], row["tags"], where)
        return
    chats = [key for key in KEYS[shape] if key not in ("messages", "label") and isinstance(row[key], list)]
    texts = [key for key in KEYS[shape] if key not in ("messages", "label", *chats)]
    if chats and (shape not in ("preference", "feedback") or texts):
        raise DataError(
            f"{where}: {chats[0]!r} is a list and {(texts or ['text'])[0]!r} is not; expected strings, or messages in all of them"
        )
    if "label" in KEYS[shape]:
        _check_label(row["label"], where, shape)
    for key in texts:
        _check_text(row[key], f"{where}: {key!r}", empty=key == "prompt")
    for key in ["messages"] if shape == "chat" else chats:
        _check_messages(row[key], key, where)


def _check_text(value: Any, where: str, *, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_kind(value)}; expected a string")
    if not value and not empty:
        raise DataError(f"{where} is empty; leave the row out or give it text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half of a surrogate pair ({value[error.start]!a}), which is not text; remove it") from None


def _check_label(value: Any, where: str, shape: Shape = "classify") -> None:
    if shape == "feedback":
        if not isinstance(value, bool):
            raise DataError(f"{where}: 'label' is {_kind(value)}; expected true or false")
    elif isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: 'label' is {_kind(value)}; expected a string or an integer")


def _check_tags(tokens: Any, tags: Any, where: str) -> None:
    for key, values in (("tokens", tokens), ("tags", tags)):
        if not isinstance(values, list) or not values:
            raise DataError(f"{where}: {key!r} is {_kind(values)}; expected a list with one entry a word")
    if len(tokens) != len(tags):
        raise DataError(f"{where} has {len(tokens)} tokens and {len(tags)} tags; expected one tag a token")
    for i, token in enumerate(tokens, 1):
        _check_text(token, f"{where}: token {i}")
    for i, tag in enumerate(tags, 1):
        _check_label(tag, f"{where}: tag {i}")


def _check_messages(messages: Any, key: str, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: {key!r} is {_kind(messages)}; expected a list of at least one {{role, content}}")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = _names(message) if isinstance(message, dict) else _kind(message)
            raise DataError(f"{where}: message {i} has {keys}; expected {{role, content}}")
        if not isinstance(message.get("train", True), bool):
            raise DataError(f"{where}: message {i}: 'train' is {_kind(message['train'])}; expected true or false")
        _check_text(message["role"], f"{where}: message {i}: 'role'")
        _check_text(message["content"], f"{where}: message {i}: 'content'", empty=True)


def _names(row: Row) -> str:
    return _braces(sorted(map(str, row)))


def _braces(keys: Iterable[str]) -> str:
    return "{" + ", ".join(keys) + "}"


def _kind(value: Any) -> str:
    return "missing" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"


assert set(KEYS) == set(get_args(Shape))
