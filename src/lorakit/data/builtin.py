"""The built-in tasks: real data that needs no network, derived at load time from vendored standard-library sources.

Eight packages of CPython (see tasks/README.md) that the bundled base never saw:
    code      one {"text"} row a source file; whole files are held out, 10-15 % of the bytes where files allow it
              (logging is three files: its smallest, 21 %, is held out)
    chat      documented functions in both directions: name and docstring -> signature line, and signature -> docstring's first
              paragraph; all pairs of one function name fall on the same side
    classify  {"text": docstring, "label": package} over all eight. The eight names themselves are masked in the text, as
              "this package", since a classifier would otherwise only look them up; words such as "Tk" stay.
Names: `builtin:<package>/code`, `builtin:<package>/chat`, `builtin:all/code`, `builtin:all/chat`, `builtin:classify`.
"""

import json
import lzma
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from lorakit.core.errors import DataError, did_you_mean
from lorakit.data.docstrings import Documented, documented, first_paragraph
from lorakit.data.row import Row
from lorakit.data.split import Split, check_split, hash_split, position

TASKS = ("asyncio", "distutils", "email", "idlelib", "importlib", "logging", "tkinter", "xml")
KINDS = ("code", "chat", "classify")
PREFIX = "builtin:"
ALL = "all"
NAMES = (*(f"{PREFIX}{task}/{kind}" for task in (*TASKS, ALL) for kind in ("code", "chat")), f"{PREFIX}classify")

VALID_BYTES = (0.10, 0.15)
VALID_FRACTION = 0.12
SHORTEST = 20  # characters of a docstring that says enough to be classified


def load_name(name: str, split: Split) -> list[Row]:
    """The rows of one side of a task by its full name; DataError with the nearest names for an unknown one."""
    if name not in NAMES:
        raise DataError(f"no built-in data is called {name!r}. {did_you_mean(name, NAMES) or 'For example: ' + NAMES[0]}")
    task, _, kind = name.removeprefix(PREFIX).rpartition("/")
    return load(task or ALL, kind, split)


def load(task: str, kind: str, split: Split) -> list[Row]:
    """The rows of one side of a task, in a fixed order.

    Args:
        task: one of TASKS, or "all"; kind "classify" knows only "all".
        kind: one of KINDS.
        split: "train" or "valid".
    """
    check_split(split)
    _check_known("task", task, (*TASKS, ALL))
    _check_known("kind", kind, KINDS)
    if kind == "classify":
        return _classify_rows(task, split)
    one = _code_rows if kind == "code" else _chat_rows
    return _distinct(row for t in (TASKS if task == ALL else (task,)) for row in one(t, split))


def source_files(task: str) -> dict[str, str]:
    """Path -> text of one task's vendored files, by path."""
    _check_known("task", task, TASKS)
    return dict(_source_files(task))


@cache
def _source_files(task: str) -> tuple[tuple[str, str], ...]:
    raw = (files("lorakit.data") / "tasks" / f"{task}.jsonl.xz").read_bytes()
    rows = [json.loads(line) for line in lzma.decompress(raw).decode().split("\n") if line]
    return tuple((row["path"], row["text"]) for row in rows)


def _check_known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise DataError(f"no built-in {what} is called {name!r}. {did_you_mean(name, names)}")


def _distinct(rows: Iterable[Row]) -> list[Row]:
    return list({json.dumps(row): row for row in rows}.values())


# -- code ---------------------------------------------------------------------------------------------------------------------


def _code_rows(task: str, split: Split) -> list[Row]:
    held = _held_files(task)
    return [{"text": text} for path, text in _source_files(task) if (path in held) == (split == "valid")]


@cache
def _held_files(task: str) -> frozenset[str]:
    """Files in hash order while the held-out bytes stay below 15 %, until they reach 10 %; else the smallest file."""
    sizes = {path: len(text.encode()) for path, text in _source_files(task)}
    low, high = (share * sum(sizes.values()) for share in VALID_BYTES)
    held: set[str] = set()
    total = 0
    for path in sorted(sizes, key=position):
        if total < low and total + sizes[path] <= high:
            held.add(path)
            total += sizes[path]
    return frozenset(held or {min(sizes, key=lambda path: sizes[path])})


# -- chat ---------------------------------------------------------------------------------------------------------------------


def _chat_rows(task: str, split: Split) -> list[Row]:
    pairs = hash_split(_functions(task), split, key=lambda f: f.name, fraction=VALID_FRACTION)
    return [row for pair in pairs for row in _both_directions(pair)]


@cache
def _functions(task: str) -> tuple[Documented, ...]:
    found = (d._replace(docstring=first_paragraph(d.docstring)) for d in _documented(task) if d.signature)
    return tuple(dict.fromkeys(found))


def _both_directions(pair: Documented) -> Iterator[Row]:
    assert pair.signature is not None
    yield _exchange(f"Write the signature of the Python function {pair.name}: {pair.docstring}", pair.signature)
    yield _exchange(f"What does this Python function do? {pair.signature}", pair.docstring)


def _exchange(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# -- classify -----------------------------------------------------------------------------------------------------------------


def _classify_rows(task: str, split: Split) -> list[Row]:
    if task != ALL:
        raise DataError(f"'classify' tells all eight packages apart, so it has no part for {task!r}; write 'builtin:classify'")
    return [dict(row) for row in hash_split(_labeled(), split, key=lambda row: row["text"], fraction=VALID_FRACTION)]


@cache
def _labeled() -> tuple[Row, ...]:
    """Distinct masked docstrings with their package; one that two packages share is left out, having no single answer."""
    labels: dict[str, set[str]] = {}
    for task in TASKS:
        for found in _documented(task):
            if len(found.docstring) >= SHORTEST:
                labels.setdefault(mask_names(found.docstring), set()).add(task)
    return tuple({"text": text, "label": next(iter(owners))} for text, owners in labels.items() if len(owners) == 1)


_NAMES = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(TASKS)})(?![A-Za-z0-9])", re.IGNORECASE)


def mask_names(text: str) -> str:
    """The text with the eight packages' names, as whole words in any case, replaced by "this package"."""
    return _NAMES.sub("this package", text)


@cache
def _documented(task: str) -> tuple[Documented, ...]:
    return tuple(d for path, text in _source_files(task) for d in documented(text, module=PurePosixPath(path).stem))
