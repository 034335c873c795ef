"""Hostile variants of good files: trees of JSON values, and bytes, changed at random. The same `Random` gives the same variant."""

import json
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 1e-320, 1e308, float("nan"), float("inf"), 0.5, "", " ", "\x00",
    "\ud800",
    "a" * 5000, "../../etc/passwd", "/etc/passwd",
    "nan", "1e9", "[]", "{}", "\u2028", "é" * 40, "lora",
    "model.layers.0.self_attn.q_proj",
    [], {}, [[]], [{}], {"": 0}, {"a": {"b": {"c": []}}}, ["x"] * 300, [0, 0], "{{ 7 }}", "{% for %}", "re:(", "re:(a+)+$",
    "*" * 50, "!!python/object:os.system",
)  # fmt: skip
"""Values that readers often forget."""


def tree(rng: Random, value: Any) -> Any:
    """The tree with one to four changes: a value replaced, removed, doubled, moved, renamed, or wrapped."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(rng, value)
    return value


def raw(rng: Random, data: bytes) -> bytes:
    """The bytes with one to six changes: cut, doubled, flipped, replaced, or something hostile put in."""
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 2, 8, 64, 512)))
        data = rng.choice(_BYTES)(rng, data, at, to)
    return data


_INSERTED = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n", b'"', b",", b"{" * 9, b"[" * 3000, b"*a", b"&a ", b"\t", b"\\u0000", b"\\ud800",
    b"9" * 400,
)  # fmt: skip
_BYTES: tuple[Any, ...] = (
    lambda rng, data, at, to: data[:at],
    lambda rng, data, at, to: data[:at] + data[to:],
    lambda rng, data, at, to: data[:to] + data[at:to] + data[to:],
    lambda rng, data, at, to: data[:at] + rng.randbytes(to - at) + data[to:],
    lambda rng, data, at, to: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :] if at < len(data) else data,
    lambda rng, data, at, to: data[:at] + rng.choice(_INSERTED) + data[at:],
)  # fmt: skip


def _changed(rng: Random, value: Any) -> Any:
    """One change somewhere in the tree, the deeper the rarer."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        return rng.choice(_IN_DICT)(rng, dict(value), key)
    if isinstance(value, list) and value and rng.random() < 0.85:
        return rng.choice(_IN_LIST)(rng, list(value), rng.randrange(len(value)))
    return rng.choice((lambda: rng.choice(HOSTILE), lambda: [value], lambda: {"x": value}, lambda: _near(rng, value)))()


def _near(rng: Random, value: Any) -> Any:
    """A neighbor of a value."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, -value, value * 2, str(value), float(value) if abs(value) < 2**53 else value))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at], value[:at] + rng.choice("._-*[]/\\é\n ") + value[at:], value.upper(), value + value))
    return value


def _deeper(rng: Random, value: Any, key: Any) -> Any:
    value[key] = _changed(rng, value[key])
    return value


def _without(rng: Random, value: Any, key: Any) -> Any:
    del value[key]
    return value


def _renamed(rng: Random, value: dict[str, Any], key: str) -> Any:
    value[str(_near(rng, key))] = value.pop(key)
    return value


def _swapped(rng: Random, value: Any, key: Any) -> Any:
    other = rng.choice(sorted(value)) if isinstance(value, dict) else rng.randrange(len(value))
    value[key], value[other] = value[other], value[key]
    return value


def _more(rng: Random, value: dict[str, Any], key: str) -> Any:
    value[rng.choice(("extra", "", "__class__", "r", "model", "name"))] = rng.choice((*HOSTILE, value[key]))
    return value


def _doubled(rng: Random, value: list[Any], at: int) -> Any:
    return value[:at] + [value[at]] * rng.choice((2, 3, 40)) + value[at:]


_IN_DICT = (_deeper, _deeper, _deeper, _deeper, _without, _renamed, _swapped, _more)
_IN_LIST = (_deeper, _deeper, _deeper, _deeper, _without, _swapped, _doubled)


def dumps(value: Any) -> bytes:
    """JSON, hostile values included (NaN, lone surrogates)."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
