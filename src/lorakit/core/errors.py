"""What can go wrong, each with one clear line: what was found, what was expected, what to type instead.

LorakitError
├── NoSuchSite · NoSuchMethod · BadParameter      a name or value the user typed
├── Incompatible                                  parts that cannot work together
├── NotMergeable · NotExportable                  an operation the method cannot do exactly
├── AdapterMismatch                               an adapter that does not fit the model or its own recipe
├── CheckpointError · DataError                   files
└── MissingExtra                                  an optional dependency
"""

import difflib
from collections.abc import Iterable

LONGEST = 1000
"""Characters of an error, which is one line: a hostile or broken file may hold any name."""


def one_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class LorakitError(Exception):
    """Base of every error that lorakit raises on purpose."""

    def __init__(self, message: str = "") -> None:
        message, half = " ".join(message.splitlines()), LONGEST // 2
        super().__init__(message if len(message) <= LONGEST else f"{message[:half]} … {message[-half:]}")


class NoSuchSite(LorakitError, ValueError):
    """A site pattern that matches nothing."""


class NoSuchMethod(LorakitError, ValueError):
    """A method name that is not registered."""


class BadParameter(LorakitError, ValueError):
    """A parameter, flag or configuration key with an unknown name or an impossible value."""


class Incompatible(LorakitError, ValueError):
    """Two parts that cannot be combined, and why."""


class NotMergeable(LorakitError, RuntimeError):
    """The update cannot move into the base weight."""


class NotExportable(LorakitError, RuntimeError):
    """The adapter has no exact form in the format asked for."""


class AdapterMismatch(LorakitError, ValueError):
    """Tensors missing, extra, misshaped, not finite, or made for another base."""


class CheckpointError(LorakitError, RuntimeError):
    """A file or folder that cannot be read or written."""


class DataError(LorakitError, ValueError):
    """Training or evaluation data that cannot be used."""


class MissingExtra(LorakitError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; it comes with the extra: pip install 'lorakit[{extra}]'")


def did_you_mean(word: str, options: Iterable[str], *, n: int = 3) -> str:
    """A trailing sentence naming the closest options, or all of them when they are few."""
    names = sorted(set(options))
    close = difflib.get_close_matches(word, names, n=n, cutoff=0.5) or [o for o in names if word and word in o][:n]
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known: {', '.join(names)}." if 0 < len(names) <= 20 else ""
