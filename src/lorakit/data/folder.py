"""A folder as a source: text files; or data files of one kind, told apart into sides by the Hub's naming conventions.

train-00000-of-00002.parquet, data/validation.jsonl, test/part.csv: the word in the file's name, else in its folder's, says the side. Where
no file has such a word all are the training side. A folder that `datasets.save_to_disk` wrote is known by its own files.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from lorakit.core.errors import DataError
from lorakit.data import textfile
from lorakit.data.jsonl import JsonLines, open_json
from lorakit.data.records import Joined, Records
from lorakit.data.tables import Tables, open_csv, saved_splits

OPEN: dict[str, Callable[[Path], Records]] = {
    ".jsonl": JsonLines,
    ".json": open_json,
    ".csv": open_csv,
    ".tsv": open_csv,
    ".parquet": lambda path: Tables([path]),
    ".arrow": lambda path: Tables([path]),
}
FAMILIES = {".jsonl": "JSON", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV", ".parquet": "Parquet", ".arrow": "Arrow"}
WORDS = {"train": "train", "training": "train"} | dict.fromkeys(("validation", "valid", "val", "dev"), "valid")
WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
BESIDE = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "metadata.json", "config.json")
"""What may stand beside data files without being data; so may read-me and license files."""

Sides = dict[str, Records]


def open_file(path: Path) -> Records:
    """One data file by its suffix. DataError for an unknown one."""
    suffix = path.suffix.lower()
    if suffix not in OPEN:
        kinds = ", ".join((*OPEN, *textfile.SUFFIXES))
        hint = "; unpack it first" if suffix in (".gz", ".zip", ".bz2", ".xz", ".zst") else ""
        raise DataError(f"{path} ends in {path.suffix!r}, which is not read; expected a folder or a file ending in one of {kinds}{hint}")
    return OPEN[suffix](path)


def open_folder(folder: Path, *, texts: bool = False) -> Sides:
    """The sides of a folder: "train", and "valid" where its names say so. `texts`: of a mixed one, the text files."""
    if (saved := saved_splits(folder)) is not None:
        return _opened(folder, {WORDS.get(split, split): paths for split, paths in saved.items()})
    found = _files(folder)
    data = [path for path in found if path.suffix.lower() in OPEN and path.name not in BESIDE]
    written = [path for path in found if path.suffix.lower() in textfile.SUFFIXES]
    if data and all(path.name.upper().startswith(("README", "LICENSE", "CITATION")) for path in written):
        return _data_sides(folder, data)
    if data and not texts:
        raise DataError(
            f"{folder} holds text files ({written[0].name}) and data files ({data[0].name}); name one file or a folder of one kind, "
            "or give data_format=text to read the text files alone"
        )
    empty = f"{folder} holds no text in files ending in {', '.join(textfile.SUFFIXES)}, and no data in {', '.join(OPEN)}"
    return {"train": textfile.text_records(written, empty)}


def _data_sides(folder: Path, data: list[Path]) -> Sides:
    families: dict[str, Path] = {}
    for path in data:
        families.setdefault(FAMILIES[path.suffix.lower()], path)
    if len(families) > 1:
        (one, first), (other, second) = list(families.items())[:2]
        raise DataError(f"{folder} holds {one} ({first.name}) and {other} ({second.name}) files; name one file, or a folder of one kind")
    sides: dict[str, list[Path]] = {}
    for path in data:
        sides.setdefault(_side(path.relative_to(folder)), []).append(path)
    loose = sides.pop("", [])
    if not sides:
        sides["train"] = loose
    elif loose:
        sides["other"] = loose
    return _opened(folder, sides)


def _opened(folder: Path, sides: dict[str, list[Path]]) -> Sides:
    """The training side and the validation side; of others a note."""
    if "train" not in sides:
        raise DataError(f"{folder} has no split called 'train'; it has {', '.join(map(repr, sides))}")
    opened: Sides = {side: _joined(sides[side]) for side in ("train", "valid") if side in sides}
    rest = ", ".join(f"{len(paths)} of {side} ({paths[0].name})" for side, paths in sides.items() if side not in opened)
    opened["train"].notes += (f"{folder}: files not read: {rest}",) if rest else ()
    return opened


def _joined(paths: list[Path]) -> Records:
    if FAMILIES[paths[0].suffix.lower()] in ("Parquet", "Arrow"):
        return Tables(paths)
    return open_file(paths[0]) if len(paths) == 1 else Joined([open_file(path) for path in paths])


def _side(path: Path) -> str:
    """The side that the name says, by the file's own words before its folders'; "" where none does."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in WORDS:
                return WORDS[word]
    return ""


def _files(folder: Path) -> list[Path]:
    """Data and text files by relative path. Hidden ones are passed over, and links to folders, which may be cycles."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    known = [path for path in found if path.suffix.lower() in (*OPEN, *textfile.SUFFIXES)]
    return sorted(known, key=lambda path: path.relative_to(folder).as_posix())
