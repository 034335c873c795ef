"""A split by stable hash: which rows are held out is a function of their content and the seed, not of their order.

Rows that are added later never move the others, and equal rows fall on the same side, so no copy of a training row is validated on.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from lorakit.core.errors import DataError

Split = Literal["train", "valid"]
Item = TypeVar("Item")


def check_split(split: str) -> None:
    """DataError unless `split` is "train" or "valid"."""
    if split not in ("train", "valid"):
        raise DataError(f"no split is called {split!r}; choose 'train' or 'valid'")


def check_fraction(fraction: float) -> None:
    """DataError unless 0 < fraction < 1."""
    if not 0 < fraction < 1:
        raise DataError(f"the validation fraction is {fraction}; expected a number between 0 and 1, both excluded")


def position(key: str, *, seed: int = 0) -> float:
    """A number in [0, 1) that depends on nothing but the key and the seed."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


def hash_split(items: Sequence[Item], split: Split, *, key: Callable[[Item], str], fraction: float, seed: int = 0) -> list[Item]:
    """The items of one split, in order; about `fraction` of the distinct keys are in "valid".

    Neither side is empty: where chance leaves one so, the key nearest to the boundary changes sides.
    DataError when there are fewer than two distinct keys to divide.
    """
    check_fraction(fraction)
    places = {k: position(k, seed=seed) for k in map(key, items)}
    if len(places) < 2:
        raise DataError(f"{len(items)} rows hold {len(places)} distinct ones, too few to split; add rows or name a validation file")
    in_order = sorted(places, key=lambda k: (places[k], k))
    count = sum(place < fraction for place in places.values())
    valid = set(in_order[: min(max(count, 1), len(in_order) - 1)])
    return [item for item in items if (key(item) in valid) == (split == "valid")]
