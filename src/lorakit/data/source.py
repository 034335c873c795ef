"""A source: the one string a user writes for data, and the rows of its train or validation side.

data.jsonl           JSON Lines in one of the four shapes of `row`
notes.txt            one text file; its last part is the validation side
docs/                a folder of text files, recursively (suffixes: see `textfile`)
builtin:asyncio/code a built-in task (see `builtin`)
hf:name[:config]     a Hugging Face dataset, the only kind that may use the network
"""

import difflib
import os
from pathlib import Path

from lorakit.core.errors import DataError
from lorakit.data import builtin
from lorakit.data.hub import read_hub
from lorakit.data.jsonl import read_jsonl
from lorakit.data.row import Row, canonical
from lorakit.data.split import Split, check_fraction, check_split, hash_split
from lorakit.data.textfile import SUFFIXES, read_folder, read_text

HUB = "hf:"


def load_rows(
    source: str | os.PathLike[str],
    split: Split,
    *,
    valid: str | os.PathLike[str] | None = None,
    valid_fraction: float = 0.1,
    seed: int = 0,
) -> list[Row]:
    """The rows of one side of a source, in a fixed order.

    With `valid`, the validation side is that source and the training side is all of `source`. Without it, a source that has
    a validation side of its own (built-in, Hub) keeps it, a lone text file is cut near its end, and any other source is split
    by a stable hash of its rows.
    DataError, in one line, for anything missing, empty, mixed, not UTF-8 or not JSON.
    """
    check_split(split)
    name = os.fspath(source)
    if valid is not None:
        return _whole(os.fspath(valid) if split == "valid" else name, split)
    if name.startswith(builtin.PREFIX):
        return builtin.load_name(name, split)
    if name.startswith(HUB):
        return _hub_side(name, split, valid_fraction, seed)
    path = _existing(name)
    if path.is_file() and path.suffix in SUFFIXES:
        return [_cut(read_text(path)["text"], split, valid_fraction, path)]
    return hash_split(_read(path), split, key=canonical, fraction=valid_fraction, seed=seed)


def _whole(name: str, split: Split) -> list[Row]:
    """All rows of a source; of one that is already divided, the side asked for."""
    if name.startswith(builtin.PREFIX):
        return builtin.load_name(name, split)
    if name.startswith(HUB):
        train, valid = read_hub(name.removeprefix(HUB))
        return valid if split == "valid" and valid is not None else train
    return _read(_existing(name))


def _hub_side(name: str, split: Split, fraction: float, seed: int) -> list[Row]:
    train, valid = read_hub(name.removeprefix(HUB))
    if valid is not None:
        return valid if split == "valid" else train
    return hash_split(train, split, key=canonical, fraction=fraction, seed=seed)


def _read(path: Path) -> list[Row]:
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix in SUFFIXES:
        return [read_text(path)]
    kinds = ", ".join((".jsonl", *SUFFIXES))
    raise DataError(f"{path} ends in {path.suffix!r}, which is not read; expected a folder or a file ending in one of {kinds}")


def _cut(text: str, split: Split, fraction: float, path: Path) -> Row:
    """A lone file has no rows to divide: its last lines, about `fraction` of its characters, are the validation side."""
    check_fraction(fraction)
    goal = int(len(text) * (1 - fraction))
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())  # text on both sides of the cut
    at = (text.find("\n", max(goal - 1, first), last) + 1) or (text.rfind("\n", first, last) + 1)
    if not at:
        raise DataError(f"{path} is a single line, too short to split; name a validation file")
    return {"text": text[at:] if split == "valid" else text[:at]}


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if os.path.exists(path):
        return path
    raise DataError(f"{name!r} is no file or folder{_hint(name, path)}")


def _hint(name: str, path: Path) -> str:
    neighbors = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    close = [str(path.parent / n) for n in difflib.get_close_matches(path.name, neighbors, n=2)]
    close += difflib.get_close_matches(builtin.PREFIX + name, builtin.NAMES, n=1, cutoff=0.8)
    if close:
        return f". Did you mean {' or '.join(map(repr, close))}?"
    return f"; for a built-in task write 'builtin:asyncio/code', for a dataset of the Hub 'hf:{name}'"
