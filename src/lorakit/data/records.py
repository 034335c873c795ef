"""Records: what a file holds, one object an entry, read when asked for and named in errors. The one protocol of all readers.

A reader holds where its records begin (8 bytes each) or a memory map, never the records; so a file may be larger than memory. It can be
pickled: a process that tokenizes opens the file anew. A file that changes while it is read is an error.
"""

import json
import os
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from lorakit.core.errors import DataError
from lorakit.data.row import BadRow

LONGEST = 1 << 28
"""Bytes of the longest line that is read: a longer one means that the file is not made of lines."""
DEEPEST = 64
"""Most levels of lists and objects in one another: deeper ones are no data, and would not survive a recursive writer."""
AT_ONCE = 1 << 30
"""Bytes that the system is asked for at once: it gives no 2 GiB."""


class Records(ABC):
    """`len(records)` entries; `read(i)` is the i-th as the file has it."""

    notes: tuple[str, ...] = ()
    """What a user should know of how the file was read."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def read(self, i: int) -> Any:
        """The i-th, from 0. BadRow where it cannot be read, DataError where the file changed."""

    @abstractmethod
    def where(self, i: int) -> str:
        """How errors call the i-th: file and line, or row."""


class Place:
    """`records.where(i)`, made when somebody asks: lines are counted only for errors."""

    __slots__ = ("i", "records")

    def __init__(self, records: Records, i: int) -> None:
        self.records, self.i = records, i

    def __str__(self) -> str:
        return self.records.where(self.i)


class Held(Records):
    """Records that are in memory."""

    def __init__(self, items: Sequence[Any], name: str) -> None:
        self.items, self.name = items, name

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int) -> Any:
        value = self.items[i]
        if not isinstance(value, dict):
            where = self.where(i)
            raise BadRow(f"{where} is a JSON {type(value).__name__}, not an object", where, reason="not an object")
        return value

    def where(self, i: int) -> str:
        return f"{self.name} row {i + 1}"


class Blocks(Records):
    """Records that are quicker made BLOCK at a time, which is done as long as they are read in order."""

    BLOCK = 256
    _made: tuple[int, list[Any]] = (0, [])

    @abstractmethod
    def block(self, start: int, size: int) -> list[Any]:
        """At most `size` records from `start` on, at least one."""

    def read(self, i: int) -> Any:
        start, made = self._made
        if not start <= i < start + len(made):
            made = self.block(i, self.BLOCK if i in (0, start + len(made)) else 1)
            if not made:
                raise DataError(f"{self.where(i)} is missing: the file holds fewer rows than it says; it is damaged, or was cut off")
            self._made = (i, made)
            start = i
        return dict(made[i - start])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_made"}


class Joined(Records):
    """The records of several files, one after the other."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self.parts = tuple(parts)
        self.ends = tuple(accumulate(map(len, self.parts)))
        self.notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))

    def __len__(self) -> int:
        return self.ends[-1]

    def _at(self, i: int) -> tuple[Records, int]:
        k = bisect_right(self.ends, i)
        return self.parts[k], i - (self.ends[k - 1] if k else 0)

    def read(self, i: int) -> Any:
        part, j = self._at(i)
        return part.read(j)

    def where(self, i: int) -> str:
        part, j = self._at(i)
        return part.where(j)


class Bytes:
    """A file that is read at offsets (by `pread` where the system has it, which threads and forked processes may share)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path} is no regular file; expected a file or a folder")
        self._fd: int | None = None
        self._counted = (0, 0)
        self._stamp = stamp(path)
        self.size = self._stamp[0]

    def at(self, start: int, end: int) -> bytes:
        """The bytes [start, end)."""
        if self._fd is None:
            self._fd = self._open()
        if _seen(os.fstat(self._fd)) != self._stamp:
            raise self._changed()
        return b"".join([_pread(self._fd, min(AT_ONCE, end - at), at) for at in range(start, end, AT_ONCE)])

    def lines(self) -> Iterator[bytes]:
        """Every line with its end, in one pass. Only \\n ends a line: str.splitlines also cuts at U+2028, which JSON holds."""
        number = 0
        with _reading(self.path) as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise DataError(f"{self.path}, line {number} is longer than {LONGEST >> 20} MiB; expected one row a line")
                yield line
        self.check()

    def line_at(self, offset: int) -> int:
        """The number of the line that holds this byte."""
        start, lines = self._counted if self._counted[0] <= offset else (0, 0)
        lines += sum(self.at(a, min(a + (1 << 20), offset)).count(b"\n") for a in range(start, offset, 1 << 20))
        self._counted = (offset, lines)  # whoever asks for many asks in order
        return 1 + lines

    def check(self) -> None:
        """DataError if the file is not what it was."""
        if stamp(self.path) != self._stamp:
            raise self._changed()

    def _open(self) -> int:
        self.check()
        try:
            fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, fd)
        return fd

    def _changed(self) -> DataError:
        return DataError(f"{self.path} changed while it was being read; start again once nothing writes to it")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fd": None}


def stamp(path: Path) -> tuple[int, int]:
    """The file's size and time of its last change, in bytes and nanoseconds."""
    try:
        return _seen(path.stat())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _seek_and_read(fd: int, size: int, at: int) -> bytes:
    """What Windows has instead of `pread`, for one thread."""
    os.lseek(fd, at, os.SEEK_SET)
    return os.read(fd, size)


_pread = getattr(os, "pread", _seek_and_read)


def _seen(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _reading(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def check_encoding(head: bytes, path: Path) -> int:
    """Bytes of the UTF-8 byte-order mark that the file begins with, 0 or 3. DataError for UTF-16 and UTF-32."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise DataError(f"{path} is UTF-16 or UTF-32; save it as UTF-8")
    return 3 if head.startswith(b"\xef\xbb\xbf") else 0


def decode(raw: bytes, where: object) -> str:
    """UTF-8 text of one record; BadRow naming the byte that is not UTF-8, or a NUL, which no text holds."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        message = f"{where} is not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8"
        raise BadRow(message, where, reason="not UTF-8") from None
    if "\0" in text:
        raise BadRow(f"{where} holds a NUL byte; expected text in UTF-8", where, reason="NUL byte")
    return text


def parse_json(text: str, where: object, *, expected: str) -> Any:
    """The value of a JSON text. BadRow for what is not JSON, for a key given twice, NaN, and nesting beyond reason."""
    try:
        value = _DECODER.decode(text)
    except _Refused as error:
        raise BadRow(f"{where} {error}", where, reason=error.reason, field=error.field) from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise BadRow(f"{where} is not JSON ({reason}): {short(text)}; expected {expected}", where, reason="not JSON") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise BadRow(f"{where} is nested more than {DEEPEST} levels deep; expected {expected}", where, reason="nested too deep")
    return value


def short(text: str) -> str:
    """The text as an error shows it: on one line, at most 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


class _Refused(Exception):
    def __init__(self, message: str, reason: str, field: str = "") -> None:
        super().__init__(message)
        self.reason, self.field = reason, field


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"gives the key {short(twice)} twice; keep one", "key given twice", twice)
    return found


def _constant(name: str) -> Any:
    raise _Refused(f"holds {name}, which is not JSON; write null or a number", "NaN or Infinity")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion; stops where it is too deep."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        depth += bool(inner)
        level = [v for one in inner for v in one]
    return depth
