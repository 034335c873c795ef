"""Rows that are made when somebody asks for them: sequences over records, over one another, over chosen places. All can be pickled.

Each holds at most a small integer a row. Two that have equal rows are equal, as lists are.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

from lorakit.data.recognize import Format
from lorakit.data.records import Records
from lorakit.data.row import Row

Places = NDArray[np.int64]


class LazyRows(Sequence[Row]):
    """What all of them do: indexing from either end, slices without copies, equality with any sequence of rows."""

    @abstractmethod
    def row(self, i: int) -> Row:
        """The i-th row, 0 <= i < len."""

    @abstractmethod
    def where(self, i: int) -> str:
        """How errors call the i-th row: its file and line, where they are known."""

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "LazyRows": ...
    def __getitem__(self, at: int | slice) -> "Row | LazyRows":
        if isinstance(at, slice):
            return Chosen(self, np.arange(len(self), dtype=np.int64)[at])
        i = range(len(self))[at]
        return self.row(i)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} rows"


class Chosen(LazyRows):
    """Some of another sequence's rows, in any order, also several times."""

    def __init__(self, rows: Sequence[Row], places: Places) -> None:
        self.rows: Sequence[Row] = rows.rows if isinstance(rows, Chosen) else rows
        self.places: Places = rows.places[places] if isinstance(rows, Chosen) else places

    def __len__(self) -> int:
        return len(self.places)

    def row(self, i: int) -> Row:
        return self.rows[int(self.places[i])]

    def where(self, i: int) -> str:
        return place_of(self.rows, int(self.places[i]))


class Chain(LazyRows):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self.parts = tuple(parts)
        self.ends = tuple(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def row(self, i: int) -> Row:
        k, j = self._place(i)
        return self.parts[k][j]

    def where(self, i: int) -> str:
        k, j = self._place(i)
        return place_of(self.parts[k], j)

    def _place(self, i: int) -> tuple[int, int]:
        k = bisect_right(self.ends, i)
        return k, i - (self.ends[k - 1] if k else 0)


class Made(LazyRows):
    """Every record as the row that a format makes of it."""

    def __init__(self, records: Records, form: Format) -> None:
        self.records, self.form = records, form

    def __len__(self) -> int:
        return len(self.records)

    def row(self, i: int) -> Row:
        return self.form.row(self.records, i)

    def where(self, i: int) -> str:
        return str(self.records.where(i))


def place_of(rows: Sequence[Row] | None, i: int) -> str:
    """`where` of any rows."""
    return rows.where(i) if isinstance(rows, LazyRows) else f"row {i + 1}"
