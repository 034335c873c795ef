"""A source: the one string a user writes for data, and the rows of its train and validation sides.

data.jsonl           a file of rows: .jsonl .json (`jsonl`), .csv .tsv .parquet .arrow (`tables`)
notes.txt            one text file; its last part is the validation side (`textfile`)
docs/                a folder of text files, recursively; or of data files of one kind (`folder`)
builtin:asyncio/code a built-in task (`builtin`)
hf:name[:config]     a Hugging Face data set, the only kind that may use the network (`hub`)

Every record of a file goes one way: read, made a row by the format that the first one fits (`recognize`), checked, and split by its hash,
in one pass that holds 8 bytes a row. What comes back are sequences that read a row again when they are asked for it.
"""

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lorakit.core.errors import DataError
from lorakit.data import builtin
from lorakit.data.folder import Sides, open_file, open_folder
from lorakit.data.hub import open_hub
from lorakit.data.lazy import Chosen, LazyRows, Made
from lorakit.data.recognize import BESIDE, Format, check_columns, recognize
from lorakit.data.records import Place, Records
from lorakit.data.row import BadRow, Row, Shape, canonical, leaving_out, shape_of
from lorakit.data.split import Split, check_fraction, check_split, hashed, held_out
from lorakit.data.textfile import SUFFIXES, cut_text, text_records

HUB = "hf:"
LISTED = 20
"""Bad rows that notes list; all are in `Loaded.skipped`."""


@dataclass(frozen=True)
class Reading:
    """How records become rows: what they are (`recognize.FORMATS` or auto), our names -> the file's, and whether bad ones are left out."""

    data_format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: where it stands, the field at fault ("" for all of it), why in a few words, and in a sentence."""

    where: str
    field: str
    reason: str
    message: str


@dataclass(frozen=True)
class Loaded:
    """Both sides of a source, their shape, and what a user should know: the format recognized and why, rows left out."""

    train: Sequence[Row]
    valid: Sequence[Row]
    shape: Shape
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


def load_rows(
    source: str | os.PathLike[str],
    split: Split,
    *,
    valid: str | os.PathLike[str] | None = None,
    valid_fraction: float = 0.1,
    seed: int = 0,
    data_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Sequence[Row]:
    """The rows of one side of a source, in a fixed order; see `load_source`."""
    check_split(split)
    reading = Reading(data_format, columns or {}, skip_bad)
    if valid is not None:
        return _whole(os.fspath(valid if split == "valid" else source), split, reading).rows
    loaded = load_source(source, valid_fraction=valid_fraction, seed=seed, reading=reading)
    return loaded.valid if split == "valid" else loaded.train


def load_source(
    source: str | os.PathLike[str],
    *,
    valid: str | os.PathLike[str] | None = None,
    valid_fraction: float = 0.1,
    seed: int = 0,
    reading: Reading | None = None,
) -> Loaded:
    """Both sides of a source.

    With `valid`, the validation side is that source and the training side is all of `source`. Without it, a source that has
    a validation side of its own (built-in, Hub, a folder with validation files) keeps it, a lone text file is cut near its end, and any
    other source is split by a stable hash of its rows.
    DataError, in one line, for anything missing, empty, mixed, or not what its name says; of rows unless `reading` skips bad ones.
    """
    reading = reading or Reading()
    name = os.fspath(source)
    if valid is not None:
        return _both(_whole(name, "train", reading), _whole(os.fspath(valid), "valid", reading), name, os.fspath(valid))
    if name.startswith(builtin.PREFIX):
        return _both(_builtin(name, "train"), _builtin(name, "valid"), name, name)
    sides = _open(name, reading, valid_fraction)
    train = _side(sides, "train", name)
    if "valid" in sides:
        return _both(read(train, name, reading), read(sides["valid"], name, reading), name, "its validation side")
    check_fraction(valid_fraction)
    rows = read(train, name, reading, seed=seed)
    assert rows.hashes is not None
    try:
        held = held_out(rows.hashes, lambda i: canonical(rows.rows[i]), valid_fraction)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    first, last = (Chosen(rows.rows, np.flatnonzero(which)) for which in (~held, held))
    return Loaded(first, last, rows.shape, rows.notes, rows.skipped)


@dataclass(frozen=True)
class Checked:
    """All rows of one side, each of them checked; `hashes`: of their content, where a split needs them."""

    rows: Sequence[Row]
    shape: Shape
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    hashes: "np.ndarray[tuple[int], np.dtype[np.int64]] | None" = None


def read(records: Records, name: str, reading: Reading, *, seed: int | None = None) -> Checked:
    """Recognize and check every record in one pass, and hash the rows where a `seed` is given. DataError for the first bad one."""
    form, first = _recognized(records, reading)
    skipped: dict[int, Skipped] = {}
    numbers = range(len(records))

    def kept() -> Iterator[int]:
        for i in numbers:
            try:
                row = form.row(records, i)
            except BadRow as error:
                if not reading.skip_bad:
                    raise _leave_out(error) from None
                skipped[i] = Skipped(error.where or records.where(i), error.field, error.reason, str(error))
                continue
            yield hashed(canonical(row), seed=seed) if seed is not None else 0

    hashes = np.fromiter(kept(), np.int64)
    notes = (f"{name}: {form.reason(first)}", *records.notes, *_account(skipped, len(records), name))
    rows: LazyRows = Made(records, form)
    if skipped:
        rows = Chosen(rows, np.delete(np.arange(len(records), dtype=np.int64), list(skipped)))
    return Checked(rows, form.shape, notes, tuple(skipped.values()), None if seed is None else hashes)


def _recognized(records: Records, reading: Reading) -> tuple[Format, Row]:
    """The format that the first record fits, or the first that fits one where bad rows are left out."""
    first_error: BadRow | None = None
    for i in range(len(records) if reading.skip_bad else 1):
        try:
            row = records.read(i)
            some = _keys(records, i)
            if reading.columns:
                check_columns(reading.columns, some, records.where(i))
            mapped = {theirs: some[theirs] for ours, theirs in reading.columns.items() if ours in BESIDE and theirs in some}
            row = {key: some[key] for key in BESIDE if key in some} | mapped | row
            return recognize(row, Place(records, i), data_format=reading.data_format, columns=reading.columns), row
        except BadRow as error:
            first_error = first_error or error
    assert first_error is not None, "an opened source has records"
    raise DataError(f"{first_error}" if not reading.skip_bad else f"no row can be used: {first_error}")


def _leave_out(error: BadRow) -> BadRow:
    """The error of one row among others, with the way to go on without it."""
    return BadRow(leaving_out(str(error)), error.where, reason=error.reason, field=error.field)


def _keys(records: Records, start: int) -> Row:
    """What the first hundred readable records have: a key that may be left out need not be in the first."""
    found: Row = {}
    for i in range(start, min(start + 100, len(records))):
        try:
            found = records.read(i) | found
        except BadRow:
            continue
    return found


def _account(skipped: dict[int, Skipped], total: int, name: str) -> list[str]:
    """What was left out, by reason and in a list. DataError where it is more than half."""
    if not skipped:
        return []
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(one.reason for one in skipped.values()).most_common())
    what = f"{len(skipped)} of {total} rows cannot be used ({counts})"
    listed = list(skipped.values())[:LISTED]
    if 2 * len(skipped) > total:
        raise DataError(f"{name}: {what}; too many to leave out. The first: {listed[0].message}")
    more = [f"  and {len(skipped) - LISTED} more"] if len(skipped) > LISTED else []
    return [f"{name}: left out: {what}", *(f"  {one.message}" for one in listed), *more]


def _both(train: Checked, valid: Checked, name: str, other: str) -> Loaded:
    if train.shape != valid.shape:
        raise DataError(f"mixed formats: {name} holds {train.shape} data and {other} {valid.shape} data; expected one shape")
    notes = tuple(dict.fromkeys((*train.notes, *valid.notes)))
    return Loaded(train.rows, valid.rows, train.shape, notes, (*train.skipped, *valid.skipped))


def _whole(name: str, split: Split, reading: Reading) -> Checked:
    """All rows of a source; of one that is already divided, the side asked for."""
    if name.startswith(builtin.PREFIX):
        return _builtin(name, split)
    sides = _open(name, reading, None)
    return read(sides["valid"] if split == "valid" and "valid" in sides else _side(sides, "train", name), name, reading)


def _builtin(name: str, split: Split) -> Checked:
    rows = builtin.load_name(name, split)
    return Checked(rows, shape_of(rows[0]), (f"{name}: {shape_of(rows[0])}, a built-in task",))


def _open(name: str, reading: Reading, fraction: float | None) -> Sides:
    """The records of each side that the source has of its own; a lone text file is cut where a `fraction` is given."""
    if name.startswith(HUB):
        return open_hub(name.removeprefix(HUB))
    path = _existing(name)
    if path.is_dir():
        return open_folder(path, texts=reading.data_format == "text")
    if path.suffix.lower() not in SUFFIXES:
        return {"train": open_file(path)}
    if fraction is None:
        return {"train": text_records([path], f"{path} holds no text")}
    check_fraction(fraction)
    return dict(zip(("train", "valid"), cut_text(path, fraction), strict=True))


def _side(sides: Sides, split: str, name: str) -> Records:
    if split not in sides:
        raise DataError(f"{name} has no split called {split!r}; it has {', '.join(map(repr, sides))}")
    return sides[split]


def _existing(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    raise DataError(f"{name!r} is no file or folder{_hint(name, path)}")


def _hint(name: str, path: Path) -> str:
    several = [part.strip() for part in name.split(",")]
    if len(several) > 1 and all(os.path.exists(os.path.expanduser(part)) or part.startswith((HUB, builtin.PREFIX)) for part in several):
        return f"; several sources in one are typed '{{{', '.join(f'{part}: 1' for part in several)}}}', with a weight each"
    file, colon, weight = name.rpartition(":")
    if colon and weight.replace(".", "", 1).isdecimal() and os.path.exists(os.path.expanduser(file)):
        return f"; a source with its weight is typed '{{{file}: {weight}}}'"
    neighbors = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    close = [str(path.parent / n) for n in difflib.get_close_matches(path.name, neighbors, n=2)]
    close += difflib.get_close_matches(builtin.PREFIX + name, builtin.NAMES, n=1, cutoff=0.8)
    if close:
        return f". Did you mean {' or '.join(map(repr, close))}?"
    return f"; for a built-in task write 'builtin:asyncio/code', for a dataset of the Hub 'hf:{name}'"
