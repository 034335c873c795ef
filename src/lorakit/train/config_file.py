"""A configuration file: one mapping of keys to plain values, YAML or JSON, read so that nothing in it is lost or guessed.

Besides what YAML and JSON themselves refuse: a key given twice at any depth, a number that is not finite, a key that is no text, a
file that is binary or larger than `LARGEST`, and aliases that unfold to more than `MOST` values. `1e-4` is a number here, as in JSON and
YAML 1.2, and a date is text.
"""

import json
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lorakit.core.errors import BadParameter

LARGEST = 1_000_000
"""Bytes of a configuration file."""
MOST = 100_000
"""Values, once every alias is written out."""
DEEPEST = 50
"""Lists and mappings inside each other; libyaml composes them recursively, on the stack of C."""

DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
"""Suffixes of files that are given as train_data."""

_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$")


class _Loader(_Safe):  # type: ignore[misc]  # PyYAML's way to read other scalars is a subclass
    """Safe YAML without dates and base-60 numbers, with 1e-4 as a number and keys that are given once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                what = repr(key.value) if isinstance(key, yaml.ScalarNode) else "that begins here"
                raise _at(f"the key {what} is no text; put it in quotes", key.start_mark)
            if key.value in seen:
                raise _at(f"{key.value!r} is given twice; keep one", key.start_mark)
            seen.add(key.value)
        result: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return result


def _resolvers() -> dict[str, list[Any]]:
    kept = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":int", ":float"))]
        for first, pairs in _Safe.yaml_implicit_resolvers.items()
    }
    for tag, pattern, firsts in (
        ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?0b[01_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?(?:0|[1-9][0-9_]*))$"), "-+0123456789"),
        ("tag:yaml.org,2002:float", re.compile(rf"{_FLOAT.pattern}|^[-+]?(?:\d[\d_]*)?\.\d[\d_]*$|^[-+]?\d[\d_]*\.$"), "-+0123456789."),
        ("tag:yaml.org,2002:float", re.compile(r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"), "-+."),
    ):
        for first in firsts:
            kept.setdefault(first, []).append((tag, pattern))
    return kept


_Loader.yaml_implicit_resolvers = _resolvers()


class _Wrong(Exception):
    """What is wrong and where: (line, column) from 1."""

    def __init__(self, what: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(what if line is None else f"line {line}, column {column}: {what}")


def _at(what: str, mark: Any) -> _Wrong:
    return _Wrong(what, mark.line + 1, mark.column + 1)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file. Raises BadParameter in one line, with line and column where there is one."""
    try:
        if Path(path).suffix.lower() in DATA:
            raise _Wrong(f"is data, no configuration; type --train-data {path}")
        text = _text(Path(path))
        values = _json(text) if Path(path).suffix == ".json" or text.lstrip()[:1] == "{" else _yaml(text)
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise _Wrong(f"holds {_kind(values)}; expected keys and values, as in 'model: FOLDER'")
        _check(values)
    except _Wrong as error:
        raise BadParameter(f"{path}: {error}") from None
    except RecursionError:
        raise BadParameter(f"{path}: is nested too deeply; a configuration is one flat mapping") from None
    return values


def check_finite(values: dict[str, Any]) -> None:
    """Raise BadParameter for a number that is not finite, at any depth."""
    try:
        _check(values)
    except _Wrong as error:
        raise BadParameter(str(error)) from None


def parse_value(text: str) -> Any:
    """One value as a configuration file would hold it. Raises ValueError."""
    try:
        return _load(text)
    except (_Wrong, RecursionError) as error:
        raise ValueError(str(error)) from None


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise _Wrong("is a folder; expected a YAML or JSON file")
        size = path.stat().st_size
        if size > LARGEST:
            raise _Wrong(f"holds {size:,} bytes; a configuration has at most {LARGEST:,} (is it the data? that is train_data)")
        raw = path.read_bytes()
    except OSError as error:
        raise _Wrong(f"cannot be read: {error.strerror}") from None
    if b"\0" in raw:
        raise _Wrong(f"is a binary file (a zero byte at {raw.index(0)}); expected YAML or JSON text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Wrong(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _yaml(text: str) -> Any:
    tab = re.search(r"^ *\t", text, re.MULTILINE)
    try:
        return _load(text)
    except _Wrong as error:
        if tab is not None and "line" in str(error):
            line = text.count("\n", 0, tab.start()) + 1
            raise _Wrong("is indented with a tab; YAML wants spaces", line, tab.end() - tab.start()) from None
        raise


def _load(text: str) -> Any:
    loader = None
    try:
        _nesting(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark or error.context_mark, error.problem or "cannot be read"
        raise _at(f"no YAML: {what}", mark) if mark is not None else _Wrong(f"no YAML: {what}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # reader errors; numbers that Python refuses
        raise _Wrong(f"no YAML: {' '.join(str(error).split())[:120]}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _nesting(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _at("is nested too deeply; a configuration is one flat mapping", event.start_mark)


def _unfolded(node: Any) -> None:
    """Refuse aliases that hold themselves or unfold to too much: a file of a few lines can ask for all memory there is."""
    counts: dict[int, int] = {}
    open_: set[int] = set()

    def count(node: Any) -> int:
        if id(node) in counts:
            return counts[id(node)]
        if id(node) in open_:
            raise _at("an alias holds itself", node.start_mark)
        open_.add(id(node))
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        counts[id(node)] = total = 1 + sum(map(count, children))
        open_.discard(id(node))
        if total > MOST:
            raise _at(f"holds more than {MOST:,} values once its aliases are written out", node.start_mark)
        return total

    count(node)


def _json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None) if len(set(names)) < len(names) else None
        if twice is not None:
            found = [m.start() for m in re.finditer(re.escape(json.dumps(twice)) + r"\s*:", text)]
            line, column = _place(text, found[1]) if len(found) > 1 else (1, 1)
            raise _Wrong(f"{twice!r} is given twice; keep one", line, column)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        try:
            return _load(text)  # YAML's flow style begins with a brace too
        except _Wrong:
            raise _Wrong(f"no JSON: {error.msg}", error.lineno, error.colno) from None
    except ValueError as error:  # a number with more digits than Python reads
        raise _Wrong(f"no JSON: {str(error)[:200]}") from None


def _place(text: str, at: int) -> tuple[int, int]:
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def _check(value: Any, key: str = "") -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _Wrong(f"{key or 'a value'} is {value}, which is no number to train with; give a finite one")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value, 1):
            _check(inner, f"{key}[{i}]")


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")
