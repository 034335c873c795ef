"""A split by stable hash: which rows are held out is a function of their content and the seed, not of their order.

Rows that are added later never move the others, and equal rows fall on the same side, so no copy of a training row is validated on.
A row is known by 48 bits of its hash, so 8 bytes a row are all that is held.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakit.core.errors import DataError

Split = Literal["train", "valid"]
Item = TypeVar("Item")
Hashes = NDArray[np.int64]
BITS = 48


def check_split(split: str) -> None:
    """DataError unless `split` is "train" or "valid"."""
    if split not in ("train", "valid"):
        raise DataError(f"no split is called {split!r}; choose 'train' or 'valid'")


def check_fraction(fraction: float) -> None:
    """DataError unless 0 < fraction < 1."""
    if not 0 < fraction < 1:
        raise DataError(f"the validation fraction is {fraction}; expected a number between 0 and 1, both excluded")


def hashed(key: str, *, seed: int = 0) -> int:
    """BITS bits that depend on nothing but the key and the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[: BITS // 8], "big")


def position(key: str, *, seed: int = 0) -> float:
    """A number in [0, 1) that depends on nothing but the key and the seed."""
    return hashed(key, seed=seed) / (1 << BITS)


def hashes_of(keys: Iterable[str], *, seed: int = 0) -> Hashes:
    """The hash of every key, in one pass."""
    return np.fromiter((hashed(key, seed=seed) for key in keys), np.int64)


def held_out(hashes: Hashes, key: Callable[[int], str], fraction: float) -> NDArray[np.bool_]:
    """Which items are in "valid": about `fraction` of the distinct keys. `key(i)` is asked where hashes alone do not decide.

    Neither side is empty: where chance leaves one so, the key nearest to the boundary changes sides.
    DataError when there are fewer than two distinct keys to divide.
    """
    check_fraction(fraction)
    distinct = np.unique(hashes)
    if len(distinct) < 2 and len({key(i) for i in range(len(hashes))}) < 2:
        what = "one row" if len(hashes) == 1 else f"{len(hashes)} rows that are all the same"
        raise DataError(f"{what} cannot be divided into training and validation; add others, or give eval_data")
    valid: NDArray[np.bool_] = hashes / (1 << BITS) < fraction
    if valid.all() or not valid.any():
        edge, last = (distinct[-1], max) if valid.all() else (distinct[0], min)
        near = {int(i): key(int(i)) for i in np.flatnonzero(hashes == edge)}  # one key, but for a collision
        chosen = last(near.values())
        valid[[i for i, k in near.items() if k == chosen]] ^= True
    return valid


def hash_split(items: Sequence[Item], split: Split, *, key: Callable[[Item], str], fraction: float, seed: int = 0) -> list[Item]:
    """The items of one split, in order; see `held_out`."""
    valid = held_out(hashes_of(map(key, items), seed=seed), lambda i: key(items[i]), fraction)
    return [item for item, held in zip(items, valid, strict=True) if held == (split == "valid")]
