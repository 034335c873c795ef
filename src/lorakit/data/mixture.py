"""Several sources in one, with weights: which rows of each an epoch has, as numbers of rows and never as copies.

passes   a weight is how often a source is passed over in an epoch: 2 is every row twice, 0.5 always the same half
under    weights are shares of the rows of an epoch, which ends when the first source is used up; of the others it has a part
over     the same, but it ends when every source was used up once; the others are repeated
A part of a source is the rows with the smallest hashes of their content, so it does not depend on their order. The sources alternate
evenly, each in its own order: files are still read from front to back, and the first rows of a mixture are a small mixture.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorakit.core.errors import DataError
from lorakit.data.lazy import Chain, Chosen
from lorakit.data.row import Row, canonical
from lorakit.data.split import hashes_of

Strategy = Literal["passes", "under", "over"]


def mixed(sources: Mapping[str, Sequence[Row]], weights: Mapping[str, float], strategy: Strategy) -> tuple[Chosen, tuple[str, ...]]:
    """The rows of an epoch, and a line a source with rows x weight = share. DataError for a weight that is no positive number."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"the weight of {name} is {weight}; expected a positive number, or leave the source out")
    counts = _counts({name: len(rows) for name, rows in sources.items()}, weights, strategy)
    for name, count in counts.items():
        if not count:
            raise DataError(f"{name} gives no row: {len(sources[name])} rows with weight {weights[name]:g} ({strategy}); raise the weight")
    chosen = [_places(rows, counts[name]) for name, rows in sources.items()]
    starts = np.cumsum([0, *map(len, sources.values())])
    places = np.concatenate([places + start for places, start in zip(chosen, starts, strict=False)])
    turns = np.concatenate([(np.arange(len(places)) + 0.5) / len(places) for places in chosen])
    total = sum(counts.values())
    lines = tuple(
        f"{name}: {len(rows)} rows x {weights[name]:g} -> {counts[name]} rows, {100 * counts[name] / total:.1f} % of an epoch"
        for name, rows in sources.items()
    )
    return Chosen(Chain(list(sources.values())), places[np.argsort(turns, kind="stable")]), lines


def _counts(sizes: Mapping[str, int], weights: Mapping[str, float], strategy: Strategy) -> dict[str, int]:
    """Rows of each source in an epoch."""
    if strategy == "passes":
        return {name: round(n * weights[name]) for name, n in sizes.items()}
    bound = min if strategy == "under" else max
    length = bound(n / weights[name] for name, n in sizes.items())
    return {name: round(length * weights[name]) for name in sizes}


def _places(rows: Sequence[Row], count: int) -> NDArray[np.int64]:
    """Whole passes, and a fixed part for what is left."""
    passes, rest = divmod(count, len(rows))
    everything = np.arange(len(rows), dtype=np.int64)
    if not rest:
        return np.tile(everything, passes)
    hashes = hashes_of(f"part:{canonical(row)}" for row in rows)
    part = np.sort(np.argsort(hashes, kind="stable")[:rest])
    return np.concatenate([np.tile(everything, passes), part])
