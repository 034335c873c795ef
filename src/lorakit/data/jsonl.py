"""JSON Lines: one JSON object a line, UTF-8, all in the first line's shape (see `row`). Blank lines are passed over."""

import json
from collections.abc import Iterator
from pathlib import Path

from lorakit.core.errors import DataError
from lorakit.data.row import Row, check_rows
from lorakit.data.textfile import decode, read_bytes


def read_jsonl(path: Path) -> list[Row]:
    """Every row of the file; DataError naming the line that is not JSON, not an object, or not shaped like the first."""
    rows = check_rows(_lines(path))
    if not rows:
        raise DataError(f"{path} holds no rows; expected one JSON object a line")
    return rows


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(decode(read_bytes(path), path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(line, where)


def _object(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise DataError(f"{where} is not JSON ({reason}): {_short(line)}; expected one JSON object a line") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is a JSON {type(value).__name__}, not an object: {_short(line)}")
    return value


def _short(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
