"""A row: one example, a plain dict in one of seven shapes. What files hold is brought into them by `recognize`.

text        {"text"}                          continued language modeling
chat        {"messages": [{"role", "content"}, ..]}; a message with "train": false is not learned
pair        {"prompt", "completion"}          loss on the completion alone
classify    {"text", "label"}                 label: a string or an integer
tag         {"tokens", "tags"}                lists of one length: words, and a string or an integer for each
preference  {"prompt", "chosen", "rejected"}  all three strings, or all three lists of messages
feedback    {"prompt", "completion", "label"} label: true or false; the others both strings, or both lists of messages
Other keys may stand beside these; they are kept and ignored, but for two:
kind    an integer from 0 on: which kind of sample the row is, for methods that tell kinds apart; it counts where every row has one
tools   beside messages: what the assistant may call, as OpenAI describes functions; it goes to the chat template
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


class BadRow(DataError):
    """A row that cannot be used: `where` it stands, the `field` at fault ("" for all of it) and the `reason` in a few words."""

    def __init__(self, message: str, where: object = "", *, reason: str = "", field: str = "") -> None:
        super().__init__(message)
        self.where, self.reason, self.field = str(where), reason, field


def leaving_out(said: str) -> str:
    """What is wrong with one row among others, with the way to go on without it."""
    return said if said.endswith(("?", ".")) else f"{said}; skip_bad (--skip-bad) leaves such rows out and counts them"


def shape_of(row: Row, *, where: object = "row 1") -> Shape:
    """The one shape whose keys the row has; BadRow naming the keys found when there is none or more than one."""
    fits: list[Shape] = [shape for shape, keys in KEYS.items() if all(key in row for key in keys)]
    if not isinstance(row.get("label"), bool) and "feedback" in fits:  # a pair with some other label beside it
        fits.remove("feedback")
    found = [shape for shape in fits if PART_OF.get(shape) not in fits]
    if len(found) != 1:
        what = "keys of two kinds of data" if found else "no known set of keys"
        raise BadRow(f"{where} has {what}: {names(row)}; expected {EXPECTED}", where, reason=what)
    return found[0]


def check_row(row: Row, shape: Shape, where: object) -> None:
    """BadRow unless the row is of this shape, which the first one has, with usable values."""
    missing = [key for key in KEYS[shape] if key not in row]
    if missing or (shape in PART_OF and shape_of(row, where=where) == PART_OF[shape]):
        message = f"{where} has the keys {names(row)}, but the first row makes this {shape} data: expected {_braces(KEYS[shape])}"
        raise BadRow(message, where, reason="other keys than the first row's", field=(missing or [""])[0])
    _check_values(row, shape, where)


def check_rows(rows: Iterable[tuple[object, Row]]) -> list[Row]:
    """The rows, once all have the first one's shape and usable values; `rows` yields (where, row), and where is named in errors."""
    checked: list[Row] = []
    for where, row in rows:
        check_row(row, shape_of(checked[0]) if checked else shape_of(row, where=where), where)
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
    return _ENCODER.encode(row)


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _check_values(row: Row, shape: Shape, where: object) -> None:
    if shape == "tag":
        _check_tags(row["tokens"], row["tags"], where)
        return
    chats = [key for key in KEYS[shape] if key not in ("messages", "label") and isinstance(row[key], list)]
    texts = [key for key in KEYS[shape] if key not in ("messages", "label", *chats)]
    if chats and (shape not in ("preference", "feedback") or texts):
        what = f"{chats[0]!r} is a list and {(texts or ['text'])[0]!r} is not; expected strings, or messages in all of them"
        raise BadRow(f"{where}: {what}", where, reason="a list beside a text", field=chats[0])
    if "label" in KEYS[shape]:
        _check_label(row["label"], where, shape)
    for key in texts:
        check_text(row[key], where, key, empty=key == "prompt")
    for key in ["messages"] if shape == "chat" else chats:
        _check_messages(row[key], key, where)


def check_text(value: Any, where: object, field: str, *, part: str = "", empty: bool = False) -> None:
    """BadRow unless the value is text: a string, not empty, that can be written as UTF-8. `part`: where in the row the field is."""
    if not isinstance(value, str):
        what, reason = f"is {kind(value)}; expected a string", f"{kind(value)} for a string"
    elif not value and not empty:
        what, reason = "is empty; leave the row out or give it text", "empty text"
    elif value.isascii():
        return
    else:
        try:
            value.encode()
            return
        except UnicodeEncodeError as error:
            what = f"holds half of a surrogate pair ({value[error.start]!a}), which is not text; remove it"
            reason = "half of a surrogate pair"
    name = f"{part}{field!r}" if part or not field.startswith(("token ", "tag ")) else field
    raise BadRow(f"{where}: {name} {what}", where, reason=reason, field=part + field)  # to say where is to count lines: for errors alone


def _check_label(value: Any, where: object, shape: Shape = "classify", field: str = "label") -> None:
    if isinstance(value, bool) if shape == "feedback" else isinstance(value, str | int) and not isinstance(value, bool):
        return
    expected = "true or false" if shape == "feedback" else "a string or an integer"
    reason = "no true or false for a label" if shape == "feedback" else f"{kind(value)} for a label"
    name = repr(field) if field == "label" else field
    raise BadRow(f"{where}: {name} is {kind(value)}; expected {expected}", where, reason=reason, field=field)


def _check_tags(tokens: Any, tags: Any, where: object) -> None:
    for key, values in (("tokens", tokens), ("tags", tags)):
        if not isinstance(values, list) or not values:
            message = f"{where}: {key!r} is {kind(values)}; expected a list with one entry a word"
            raise BadRow(message, where, reason=f"{kind(values)} for a list", field=key)
    if len(tokens) != len(tags):
        message = f"{where} has {len(tokens)} tokens and {len(tags)} tags; expected one tag a token"
        raise BadRow(message, where, reason="not one tag a token", field="tags")
    for i, token in enumerate(tokens, 1):
        check_text(token, where, f"token {i}")
    for i, tag in enumerate(tags, 1):
        _check_label(tag, where, field=f"tag {i}")


def _check_messages(messages: Any, key: str, where: object) -> None:
    if not isinstance(messages, list) or not messages:
        message = f"{where}: {key!r} is {kind(messages)}; expected a list of at least one {{role, content}}"
        raise BadRow(message, where, reason=f"{kind(messages)} for messages", field=key)
    for i, message in enumerate(messages, 1):
        part = f"message {i}: "
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = f"has {names(message)}" if isinstance(message, dict) else f"is {kind(message)}"
            what = f"message {i} {found}; expected {{role, content}}"
            raise BadRow(f"{where}: {what}", where, reason="a message without role or content", field=key)
        if not isinstance(message.get("train", True), bool):
            what = f"{part}'train' is {kind(message['train'])}; expected true or false"
            raise BadRow(f"{where}: {what}", where, reason="no true or false for 'train'", field=key)
        check_text(message["role"], where, "role", part=part)
        check_text(message["content"], where, "content", part=part, empty=True)


def names(keys: Iterable[Any]) -> str:
    """Keys as errors list them: sorted, on one line, the first dozen."""
    found = sorted(map(str, keys))
    shown = [key if key.isprintable() and len(key) <= 40 else repr(key[:40]) for key in found[:12]]
    return _braces([*shown, f"{len(found) - 12} more"] if len(found) > 12 else shown)


def _braces(keys: Iterable[str]) -> str:
    return "{" + ", ".join(keys) + "}"


KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}
"""Types as JSON's readers call them; a list is one there, too."""


def kind(value: Any) -> str:
    """What a value is, as errors call it."""
    return "missing" if value is None else "an empty list" if value == [] else KINDS.get(type(value), f"a {type(value).__name__}")


assert set(KEYS) == set(get_args(Shape))
