"""What a foreign key means here, and the translation that collects it.

To      a key of ours by another name               lora_rank 8 -> r 8
Idle    without effect here, and why                flash_attn: attention is chosen by itself
Only    one of a few values, or an error            stage ppo: choose sft, pt, dpo or kto
Joint   read together with others by the dialect's own function

A dialect brings its own defaults for what a user left out where they decide what is learned: a file that is taken over should learn as
it did. Keys that are empty (`wandb_project:`) count as left out.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.core.errors import BadParameter
from lorakit.train.config_file import parse_value


@dataclass(frozen=True)
class To:
    """Another name of `ours`; `named`: values that have other names, too."""

    ours: str
    named: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Idle:
    """A key without effect here, whatever its value."""

    why: str


@dataclass(frozen=True)
class Only:
    """A key that changes nothing here at one of `values`; at any other it asks for what is not done, and `instead` says what to type."""

    values: tuple[Any, ...]
    instead: str


@dataclass(frozen=True)
class Joint:
    """A key that the dialect's `settle` reads; `ours`: the keys that it decides."""

    ours: str


Rule = To | Idle | Only | Joint
SEVERAL = frozenset(
    {"lora_target", "additional_target", "lora_target_modules", "lora_modules_to_save", "datasets", "test_datasets", "pretraining_dataset",
     "report_to", "dataset", "eval_dataset", "interleave_probs", "special_tokens", "loss_type"}
)  # fmt: skip
"""Keys read together with others that may hold a list or a mapping."""


@dataclass(frozen=True)
class Dialect:
    """A tool's configuration: its name, its keys, and the function that reads those of its keys that hang together."""

    name: str
    title: str
    marks: frozenset[str]
    """Keys that only its files have: one of them makes a file its own."""
    keys: Mapping[str, Rule]
    settle: Callable[["Draft"], None]
    defaults: Mapping[str, Any]
    """Our keys: its values for what was left out, where they decide what is learned and differ from ours."""
    source: str
    """Where keys and defaults were read."""

    def aliases(self, ours: str) -> list[str]:
        """Its names for a key of ours."""
        named = {name: rule.ours.split() for name, rule in self.keys.items() if isinstance(rule, To | Joint)}
        return sorted(name for name, keys in named.items() if ours in keys and name != ours)


class Draft:
    """A translation in the making: what was given, what it is in our words, and what is to be said of it."""

    def __init__(self, dialect: Dialect, given: Mapping[str, Any], own: Mapping[str, Any], *, whole: bool) -> None:
        self.dialect = dialect
        self.given = {key: plain(value) for key, value in given.items()}
        self.given = {key: value for key, value in self.given.items() if value is not None}
        self.own = own
        self.whole = whole
        """Whether it is a file of the dialect, with its defaults; else single aliases in a configuration of ours."""
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        """Our key: the foreign one that set it."""
        self.renamed: list[str] = []
        """What is called otherwise here, and nothing more to say of it."""
        self.notes: list[str] = []
        self.idle: dict[str, list[str]] = {}
        self.left_out: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """A foreign key's value."""
        return self.given.get(key, default)

    def put(self, ours: str, value: Any, key: str, *, why: str = "") -> None:
        """Set a key of ours for a foreign one, and say so where name or value differ. Two foreign keys may agree, not contradict."""
        if ours in self.values and self.values[ours] != value:
            raise BadParameter(
                f"{self.sources[ours]} and {key} both mean {ours} and say {show(self.values[ours])} and {show(value)}; keep one"
            )
        was = self.get(key)
        self.values[ours] = value
        self.sources.setdefault(ours, key)
        if (key, show(was)) != (ours, show(value)) or why:
            said = f"{key} {show(was)} -> {ours} {show(value)}" if key in self.given else f"{key} -> {ours} {show(value)}"
            self.notes.append(f"{said} ({why})") if why else self.renamed.append(said)

    def default(self, ours: str, value: Any) -> None:
        """What the dialect does where nothing was said."""
        if self.whole and ours not in self.values and ours not in self.own:
            self.left_out[ours] = value

    def without_effect(self, key: str, why: str) -> None:
        """Name a key that does nothing here."""
        self.idle.setdefault(why, []).append(key)

    def refuse(self, key: str, instead: str) -> BadParameter:
        """The error of a key that asks for what is not done."""
        return BadParameter(f"{key}: {show(self.get(key))} ({self.dialect.title}) is not done here: {instead}")

    def known(self, ours: str) -> Any:
        """What a key of ours is so far: the user's own word first."""
        return next((where[ours] for where in (self.own, self.values, self.left_out) if ours in where), None)

    def read(self) -> None:
        """Apply every rule, then the dialect's function, then its defaults."""
        for key, value in self.given.items():
            rule = self.dialect.keys.get(key)
            if isinstance(rule, To):
                self.put(rule.ours, rule.named.get(value, value) if isinstance(value, str | int | float | bool) else value, key)
            elif isinstance(rule, Idle):
                if value is not False:  # what is switched off has no effect anywhere
                    self.without_effect(key, rule.why)
            elif isinstance(rule, Joint) and isinstance(value, list | dict) and key not in SEVERAL:
                raise BadParameter(f"{key} is {show(value)}; expected one value")
            elif isinstance(rule, Only) and not any(same(value, allowed) for allowed in rule.values):
                raise self.refuse(key, rule.instead)
        self.dialect.settle(self)
        for ours, value in self.dialect.defaults.items():
            self.default(ours, value)

    def says(self) -> list[str]:
        """The notes, a line each: what became what, what has no effect, and the dialect's own defaults."""
        lines = ["; ".join(self.renamed)] * bool(self.renamed) + self.notes
        for why, keys in self.idle.items():
            lines.append(f"without effect: {', '.join(keys)} ({why})")
        if self.left_out:
            lines.append(f"left out, so as in {self.dialect.title}: " + ", ".join(f"{k} {show(v)}" for k, v in self.left_out.items()))
        return lines


def plain(value: Any) -> Any:
    """A scalar as a file would hold it: numbers, true, false and null may be written in quotes or typed as flags."""
    if not isinstance(value, str):
        return value
    word = value.strip()
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word.lower() in ("", "none", "null"):
        return None if word.lower() != "none" else "none"
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", word) and len(word) < 40:
        return parse_value(word)
    return value


def same(value: Any, other: Any) -> bool:
    """Equal, where true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def show(value: Any) -> str:
    """A value as YAML would show it, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "…"


def words(value: Any) -> list[str]:
    """A list of names from a list or from `a,b`."""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def number(draft: Draft, key: str) -> float:
    """A number, or an error."""
    value = draft.get(key)
    if not is_number(value):
        raise BadParameter(f"{key}: {show(value)} is no number")
    return value  # type: ignore[no-any-return]


def is_number(value: Any) -> bool:
    """Whether it is one that a float holds: true is none, nor are NaN and what is infinite or would be."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e300
