"""Plain text files, alone or in a folder: each is one {"text"} row.

Suffixes read: .txt .md .rst .py. In a folder they are found recursively, in the order of their relative paths; hidden files
and folders (a leading dot) are passed over, and so are files without any text (an empty `__init__.py`).
A file of more than PIECE bytes is several rows: it is cut at ends of lines (inside a line only where one alone is longer), so that it
is never held whole; a piece of nothing but white space is no row.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorakit.core.errors import DataError
from lorakit.data.records import Bytes, Held, Records, check_encoding, decode
from lorakit.data.row import BadRow, Row

SUFFIXES = (".txt", ".md", ".rst", ".py")
PIECE = 8 << 20
"""Bytes of text in a row, at most."""


class Pieces(Records):
    """Text files as rows: whole, or in pieces. Holds three numbers for each."""

    def __init__(self, files: Sequence[Bytes], spans: Sequence[tuple[int, int, int]]) -> None:
        self.files, self.spans = tuple(files), np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, i: int) -> Row:
        file, start, end = map(int, self.spans[i])
        return {"text": _text(self.files[file], start, end)}

    def where(self, i: int) -> str:
        file, start, _ = map(int, self.spans[i])
        path = self.files[file].path
        return f"{path}, from byte {start}" if start > 3 else str(path)


def text_records(paths: Sequence[Path], empty: str) -> Records:
    """The rows of these files; DataError with the line `empty` if there is no text in any of them."""
    files = [Bytes(path) for path in paths]
    spans = [(n, a, b) for n, file in enumerate(files) for a, b in pieces(file) if _text(file, a, b).strip()]
    if not spans:
        raise DataError(empty)
    return Pieces(files, spans)


def pieces(file: Bytes, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Where to cut the bytes [start, end) of a file so that no piece has more than PIECE of them."""
    end = file.size if end is None else end
    if start == 0:
        start = check_encoding(file.at(0, min(4, end)), file.path)
    found = []
    while end - start > PIECE:
        window = file.at(start, start + PIECE)
        cut = window.rfind(b"\n") + 1 or _whole_letters(window)
        found.append((start, start + cut))
        start += cut
    return [*found, (start, end)] if end > start else found


def cut_text(path: Path, fraction: float) -> tuple[Records, Records]:
    """A lone file has no rows to divide: its last lines, about `fraction` of its characters, are the validation side.

    Of a file in pieces it is about `fraction` of its bytes.
    """
    file = Bytes(path)
    spans = pieces(file)
    if len(spans) > 1:
        goal = file.size - max(1, int(file.size * fraction))
        at = goal + file.at(goal, min(goal + PIECE, file.size)).find(b"\n") + 1
        if not goal < at < file.size:  # a line so long that it is cut anyway
            at = next((start for start, _ in spans if start >= goal), spans[-1][0])
        first, last = ([(0, a, b) for a, b in pieces(file, *span) if _text(file, a, b).strip()] for span in ((0, at), (at, file.size)))
        if not first or not last:
            raise DataError(f"{path} has text on one side of its cut only; name a validation file")
        return Pieces([file], first), Pieces([file], last)
    text = "".join(_text(file, a, b) for a, b in spans)
    if not text.strip():
        raise DataError(f"{path} holds no text")
    at = _cut(text, fraction, path)
    return Held([{"text": text[:at]}], f"{path},"), Held([{"text": text[at:]}], f"{path},")


def _cut(text: str, fraction: float, path: Path) -> int:
    goal = int(len(text) * (1 - fraction))
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())  # text on both sides of the cut
    at = (text.find("\n", max(goal - 1, first), last) + 1) or (text.rfind("\n", first, last) + 1)
    if not at:
        raise DataError(f"{path} is a single line, too short to split; name a validation file")
    return at


def _whole_letters(window: bytes) -> int:
    """Where a window may end without cutting a character of UTF-8."""
    at = len(window)
    while at > max(1, len(window) - 4) and window[at - 1] & 0xC0 == 0x80:
        at -= 1
    return at - 1 if at > 1 and window[at - 1] >= 0xC0 else len(window)


def _text(file: Bytes, start: int, end: int) -> str:
    raw = file.at(start, end)
    try:
        return decode(raw, file.path)
    except BadRow as error:
        bad = raw.find(b"\0") if error.reason == "NUL byte" else _first_bad(raw)
        line = file.line_at(start + bad)
        raise BadRow(str(error).replace(str(file.path), f"{file.path}, line {line}", 1), file.path, reason=error.reason) from None


def _first_bad(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0
