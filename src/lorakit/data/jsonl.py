"""JSON: .jsonl is one object a line (blank lines are passed over), .json a list of objects.

A .json file may also be JSON Lines under a short name, or an object around one list: {"data": [...]} or another of WRAPPERS.
Lines are read when asked for; a list is read whole, so what is larger than memory should be JSON Lines.
"""

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.core.errors import DataError
from lorakit.data.records import Bytes, Held, Place, Records, check_encoding, decode, parse_json, short
from lorakit.data.row import BadRow

WRAPPERS = ("data", "train", "rows", "examples", "instances", "items", "samples")
LINE = "one JSON object a line"
LIST = "a list of objects"


class JsonLines(Records):
    """The lines of a file. Holds 8 bytes for each."""

    def __init__(self, path: Path) -> None:
        self.file = Bytes(path)
        offset, starts = 0, array("q")
        for line in self.file.lines():
            mark = 0 if offset else check_encoding(line, path)
            if line[mark:].strip():
                starts.append(offset + mark)
            offset += len(line)
        if not starts:
            raise DataError(f"{path} holds no rows; expected {LINE}")
        starts.append(offset)
        self.starts = np.frombuffer(starts, np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, i: int) -> Any:
        where = Place(self, i)
        text = decode(self.file.at(int(self.starts[i]), int(self.starts[i + 1])), where).strip()
        value = parse_json(text, where, expected=LINE)
        if not isinstance(value, dict):
            hint = "; a file that is one list must end in .json" if isinstance(value, list) and i == 0 else ""
            message = f"{where} is a JSON {type(value).__name__}, not an object: {short(text)}{hint}"
            raise BadRow(message, where, reason="not an object")
        return value

    def where(self, i: int) -> str:
        return f"{self.file.path}, line {self.file.line_at(int(self.starts[i]))}"


def open_json(path: Path) -> Records:
    """The objects of a .json file: its one list, or its lines."""
    file = Bytes(path)
    lines = (line for line in file.lines() if line.strip(b"\xef\xbb\xbf \t\r\n"))
    first, second = next(lines, b""), next(lines, None)
    check_encoding(first[:4], path)
    if not first:
        raise DataError(f"{path} holds no rows; expected {LIST}")
    if _is_row(first, path, alone=second is None):
        return JsonLines(path)
    raw = file.at(0, file.size)
    try:
        found = parse_json(decode(raw[check_encoding(raw[:4], path) :], path), path, expected=LIST)
    except BadRow as error:
        cut = "; the file seems to be cut off in the middle" if not raw.rstrip().endswith((b"]", b"}")) else ""
        raise DataError(f"{error}{cut}") from None
    rows = _list_of(found, path)
    if not rows:
        raise DataError(f"{path} holds no rows; expected {LIST}")
    return Held(rows, f"{path},")


def _is_row(line: bytes, path: Path, *, alone: bool) -> bool:
    """Whether a file that begins so is JSON Lines: the line is an object, and no wrapper of the rows."""
    try:
        value = parse_json(decode(line.removeprefix(b"\xef\xbb\xbf"), path), path, expected=LINE)
    except BadRow:
        return False
    return isinstance(value, dict) and not (alone and any(isinstance(value.get(key), list) for key in WRAPPERS))


def _list_of(found: Any, path: Path) -> list[Any]:
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        raise DataError(f"{path} is a JSON {type(found).__name__}; expected {LIST}")
    lists = [key for key in WRAPPERS if isinstance(found.get(key), list)]
    if len(lists) == 1:
        return list(found[lists[0]])
    if lists:
        raise DataError(f"{path} holds several lists ({', '.join(lists)}); write one file for each")
    return [found]  # one row, written on several lines
