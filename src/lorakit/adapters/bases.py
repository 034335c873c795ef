"""Whether several adapters were made for the same weights."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from lorakit.core.errors import AdapterMismatch
from lorakit.core.fingerprint import Fingerprint


def check_same_base(metas: Mapping[str, Mapping[str, Any]]) -> None:
    """Of adapters by name, their meta. An unknown base agrees with every other. Raises AdapterMismatch, naming both."""
    prints = {name: Fingerprint(**meta["base"]) for name, meta in metas.items() if meta.get("base")}
    for (a, base_a), (b, base_b) in combinations(prints.items(), 2):
        if base_a.matches(base_b) is False:
            raise AdapterMismatch(
                f"{a} was made for {base_a} and {b} for {base_b}: they change different weights; force=True (--force) takes them together"
            )
