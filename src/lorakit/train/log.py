"""A run's rows of metrics, which survive a kill, and files that are replaced in one go."""

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from lorakit.core.errors import BadParameter, DataError

Row = dict[str, Any]


class MetricsLog:
    """An append-only file of one JSON object a line, each with its `step`.

    A row is one line and leaves the process as it is appended, so that `kill -9` costs at most a torn last line, which readers skip and
    the next opening cuts off. `sync` makes the rows outlive the machine too; `truncate` drops those that a resumed run will redo.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._cut(_whole_lines(self.path.read_bytes()))
        self._file = self.path.open("a", buffering=1, encoding="utf-8", newline="\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row: `step` and numbers, strings or None. Scalars of torch and numpy are unpacked; NaN and infinities become null."""
        if not isinstance(row.get("step"), int):
            raise BadParameter(f"a row of metrics needs an integer 'step', got {dict(row)}")
        self._file.write(json.dumps({k: _plain(k, v) for k, v in row.items()}, allow_nan=False) + "\n")

    def rows(self) -> list[Row]:
        """Every row so far."""
        return read_log(self.path)

    def sync(self) -> None:
        """Return when everything appended is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate(self, step: int) -> None:
        """Cut the file before the first row of a later step than `step`: the run goes on from there."""
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if json.loads(line)["step"] > step:
                break
            kept += len(line)
        self._cut(kept)
        self.sync()

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cut(self, size: int) -> None:
        if size < self.path.stat().st_size:
            os.truncate(self.path, size)


def read_log(path: str | Path) -> list[Row]:
    """The rows of a metrics file, which may be in writing: a torn last line is left out, a broken one before it is an error."""
    data, rows = Path(path).read_bytes(), list[Row]()
    for number, line in enumerate(data[: _whole_lines(data)].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise DataError(f"{path}, line {number}: not a JSON row: {line[:60]!r}") from e
    return rows


def _whole_lines(data: bytes) -> int:
    """Bytes up to and including the last line break: what was written whole."""
    return data.rfind(b"\n") + 1


def _plain(key: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise BadParameter(f"a metric must be one number, a string or None; {key!r} is a {type(value).__name__}") from e
    return number if math.isfinite(number) else None


def replace_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Write beside `path`, then move over it: a reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    return partial.replace(path)
