"""Tables: CSV and TSV, Parquet, Arrow (IPC files and streams, folders of `datasets.save_to_disk`). Rows are read when asked for.

CSV: UTF-8, the first row names the columns, quotes as in RFC 4180; of a .csv whose header has no comma, semicolon or tab may divide the
cells. Cells are strings. 8 bytes a row are held.
Parquet: one row group is held at a time. Arrow: mapped into memory, so nothing is held unless the file is compressed.
Columns that are no text, numbers, truth values, or lists and structs of them (pictures, dates) are left out, with a note.
"""

import csv
import io
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.core.errors import DataError, MissingExtra
from lorakit.data.records import Blocks, Bytes, Place, Records, check_encoding, decode, short, stamp
from lorakit.data.row import BadRow, Row

LONGEST_CELL = 1 << 26


class Csv(Records):
    """The rows of a table with a header."""

    def __init__(self, path: Path, delimiter: str = ",") -> None:
        self.file, self.delimiter = Bytes(path), delimiter
        first = next((line.decode("latin-1") for line in self.file.lines() if line.strip()), "")
        if delimiter == "," not in first and (other := next((d for d in ";\t" if d in first), None)):
            self.delimiter, self.notes = other, (f"{path}: cells are divided by {other!r}",)
        starts = array("q", (offset for offset, _ in self._records()))
        if not starts:
            raise DataError(f"{path} is empty; expected a header and rows")
        mark = check_encoding(self.file.at(0, min(4, self.file.size)), path)
        starts[0] = max(starts[0], mark)
        starts.append(self.file.size)
        self.starts = np.frombuffer(starts, np.int64)
        self.header = self._header()
        if len(self) == 0:
            raise DataError(f"{path} holds a header and no rows")

    def __len__(self) -> int:
        return len(self.starts) - 2

    def read(self, i: int) -> Row:
        where = Place(self, i)
        cells = self._cells(i + 1, where)
        if len(cells) != len(self.header):
            message = (
                f"{where} has {len(cells)} cells and the header {len(self.header)}; put cells that hold a {self.delimiter!r} in quotes"
            )
            raise BadRow(message, where, reason="not one cell a column")
        return dict(zip(self.header, cells, strict=True))

    def where(self, i: int) -> str:
        return f"{self.file.path}, line {self.file.line_at(int(self.starts[i + 1]))}"

    def _header(self) -> list[str]:
        path = self.file.path
        header = [name.strip() for name in self._cells(0, path)]
        twice = [name for name in header if header.count(name) > 1]
        if not all(header):
            raise DataError(
                f"{path}: column {header.index('') + 1} of the header has no name; expected a first line that names the columns"
            )
        if twice:
            raise DataError(f"{path}: the header names {short(twice[0])} twice; expected a first line that names each column once")
        if any(len(name) > 60 or "\n" in name for name in header):
            raise DataError(f"{path} has no header: its first line is {short(','.join(header))}; expected the columns' names")
        return header

    def _cells(self, n: int, where: object) -> list[str]:
        """The cells of the n-th record, the header being number 0."""
        text = decode(self.file.at(int(self.starts[n]), int(self.starts[n + 1])), where)
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
        try:
            found = [cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True) if cells]
        except csv.Error as error:
            why = "a quote is left open" if "unexpected end" in str(error) else str(error)
            raise BadRow(f"{where} is not CSV ({why}): {short(text)}", where, reason="not CSV") from None
        return found[0] if found else []

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(offset, cells) of every record that is not blank; the cells are not decoded. One that csv refuses ends with its line."""
        offset = 0

        def lines() -> Iterator[str]:
            nonlocal offset
            for line in self.file.lines():
                if not offset and (mark := check_encoding(line, self.file.path)):
                    offset, line = offset + mark, line[mark:]
                offset += len(line)
                yield line.decode("latin-1")  # a character a byte: where records end does not depend on the encoding

        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
        source, start = lines(), 0
        while True:
            try:
                for cells in csv.reader(source, delimiter=self.delimiter, strict=True):
                    if cells:
                        yield start, cells
                    start = offset
                return
            except csv.Error:
                yield start, []
                start = offset


def open_csv(path: Path) -> Csv:
    """A .csv or .tsv file."""
    return Csv(path, "\t" if path.suffix.lower() == ".tsv" else ",")


class Tables(Blocks):
    """Row groups of Parquet files, or record batches of Arrow files, as one sequence of rows. One of them is open at a time."""

    def __init__(self, paths: Sequence[Path], name: str = "") -> None:
        self.paths, self.name = tuple(paths), name
        self._opened: tuple[int, Any] = (-1, None)
        self._held: tuple[int, Any] = (-1, None)
        self._stamps: dict[int, tuple[int, int]] = {}
        parts, ends, dropped = [], [0], []
        for n, path in enumerate(self.paths):
            sizes, lost = self._sizes(n)
            dropped += [f"{path}: columns left out, as they hold neither text nor numbers: {', '.join(lost)}"] if lost else []
            for part, size in enumerate(sizes):
                if size:
                    parts.append((n, part))
                    ends.append(ends[-1] + size)
        if not parts:
            raise DataError(f"{name or self.paths[0]} holds no rows")
        self.parts, self.ends, self.notes = parts, np.array(ends, np.int64), tuple(dropped)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def block(self, start: int, size: int) -> list[Row]:
        k = int(np.searchsorted(self.ends, start, side="right")) - 1
        part = self._part(k)
        with _readable(self.paths[self.parts[k][0]]):  # names inside a column are decoded only now
            found: list[Row] = part.slice(start - int(self.ends[k]), size).to_pylist()
        return found

    def where(self, i: int) -> str:
        k = int(np.searchsorted(self.ends, i, side="right")) - 1
        n = self.parts[k][0]
        first = next(int(end) for (file, _), end in zip(self.parts, self.ends, strict=False) if file == n)
        return f"{self.paths[n]}, row {i - first + 1}"

    def _part(self, k: int) -> Any:
        if self._held[0] != k:
            n, part = self.parts[k]
            self._held = (-1, None)  # before the next one is read
            with _readable(self.paths[n]):
                table = self._file(n).part(part)
                table.validate(full=True)
            self._held = (k, table)
        return self._held[1]

    def _sizes(self, n: int) -> tuple[list[int], list[str]]:
        with _readable(self.paths[n]):
            file = self._file(n)
            return file.sizes(), file.dropped

    def _file(self, n: int) -> Any:
        if self._opened[0] != n:
            seen = self._stamps.setdefault(n, stamp(self.paths[n]))
            if seen != stamp(self.paths[n]):
                raise DataError(f"{self.paths[n]} changed while it was being read; start again once nothing writes to it")
            self._opened = (n, open_table(self.paths[n]))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_opened": (-1, None), "_held": (-1, None)}


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path, pre_buffer=False)
        self.columns, self.dropped = plain_columns(self.file.schema_arrow)

    def sizes(self) -> list[int]:
        return [self.file.metadata.row_group(k).num_rows for k in range(self.file.num_row_groups)]

    def part(self, k: int) -> Any:
        return self.file.read_row_group(k, columns=self.columns, use_threads=False)


class _Arrow:
    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
        mapped = pa.memory_map(str(path))
        reader: Any = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        self.reader: Any = reader if is_file else None
        self.table: Any = None if is_file else reader.read_all()
        self.columns, self.dropped = plain_columns(reader.schema)

    def sizes(self) -> list[int]:
        if self.reader is None:
            return [self.table.num_rows]
        return [self.reader.get_batch(k).num_rows for k in range(self.reader.num_record_batches)]

    def part(self, k: int) -> Any:
        return (self.table if self.reader is None else self.reader.get_batch(k)).select(self.columns)


def open_table(path: Path) -> Any:
    """The reader of one file. Raises MissingExtra."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise MissingExtra("pyarrow", "data") from None
    return (_Parquet if path.suffix.lower() == ".parquet" else _Arrow)(path)


class _readable:
    """Whatever pyarrow raises of a file becomes one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError | MissingExtra):
            what = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise DataError(f"{self.path} cannot be read as {self.path.suffix[1:] or 'arrow'}: {what[:160]}") from None


def plain_columns(schema: Any) -> tuple[list[str], list[str]]:
    """Names of the columns that a row can hold, and of the others."""
    names = [field.name for field in schema]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"the table has two columns called {short(twice[0])}; rename one")
    kept = [field.name for field in schema if _is_plain(field.type)]
    return kept, [name for name in names if name not in kept]


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    return any(test(kind) for test in tests)


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote, by split ("train" for a lone set); None for other folders."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not splits:
            raise DataError(f"{folder / 'dataset_dict.json'} names no splits; save the data set again")
        return {str(split): _saved(folder / str(split)) for split in splits}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"train": _saved(folder)}
    return None


def _saved(folder: Path) -> list[Path]:
    files = _json(folder / "state.json").get("_data_files")
    if not isinstance(files, list) or not files or not all(isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files):
        raise DataError(f"{folder / 'state.json'} names no data files; save the data set again")
    paths = [folder / Path(f["filename"]).name for f in files]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]} is missing; save the data set again")
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from None
    return found if isinstance(found, dict) else {}
