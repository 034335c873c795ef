"""A regular expression that comes from a file: it may be wrong, and it may be made to run forever."""

import re
import warnings
from pathlib import Path

from lorakit.core.errors import CheckpointError

LENGTH_LIMIT = 1000
REPEATS_LIMIT = 4
"""Unbounded repeats in one pattern: with none of them inside another, matching a name of n characters takes at most some n⁵ steps."""

_REPEATED_GROUP = re.compile(r"\)\s*(?:[*+]|\{\d*,)")
_REPEAT = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")


def checked(pattern: str, path: Path) -> str:
    """The pattern itself. Raises CheckpointError when it is no regular expression or one whose matching could take forever."""
    try:
        with warnings.catch_warnings(action="error"):  # what Python will read otherwise one day
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise CheckpointError(f"{path}: {pattern[:80]!r} is not a regular expression: {error}") from error
    if len(pattern) > LENGTH_LIMIT or _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > REPEATS_LIMIT:
        raise CheckpointError(f"{path}: the pattern {pattern[:80]!r} could take forever to match; use fewer repeats and repeat no group")
    return pattern
