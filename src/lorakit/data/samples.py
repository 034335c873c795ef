"""Tokenized samples as flat arrays, in memory or mapped from disk: data larger than memory trains, and a sample costs no Python object.

ids            [tokens]   int32, all samples' one after another
offsets        [n + 1]    int64, sample k is ids[offsets[k] : offsets[k + 1]]
labels         [tokens], [target tokens] or [n]   int32, by layout: as long as the ids, a decoder's own target, or a class's number
label_offsets  [n + 1]    of a decoder's targets
kinds          [n]        int32, −1 where a row names none; absent where no row names one
marks          [n]        int64, of feedback
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.data.account import Counts
from lorakit.data.encoded import Encoded, Labeled

Sample = TypeVar("Sample", Encoded, Labeled)
Layout = Literal["token", "target", "class"]
Ints = NDArray[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Sequence[Sample], Generic[Sample]):
    """A sequence of Encoded or Labeled, made when they are asked for. A slice is a list."""

    layout: Layout
    ids: Ints
    offsets: Ints
    labels: Ints
    label_offsets: Ints | None = None
    kinds: Ints | None = None
    marks: Ints | None = None

    @staticmethod
    def of(samples: Sequence[Any], layout: Layout) -> "Samples[Any]":
        """The arrays of Encoded or Labeled ones."""
        labels = (s.label for s in samples) if layout == "class" else chain.from_iterable(s.labels for s in samples)
        kinds = [-1 if s.kind is None else s.kind for s in samples]
        marks = [s.mark for s in samples if layout != "class" and s.mark is not None]
        return Samples(
            layout,
            np.fromiter(chain.from_iterable(s.input_ids for s in samples), dtype=np.int32),
            ends(len(s.input_ids) for s in samples),
            np.fromiter(labels, dtype=np.int32),
            ends(len(s.labels) for s in samples) if layout == "target" else None,
            np.asarray(kinds, dtype=np.int32) if max(kinds, default=-1) >= 0 else None,
            np.asarray(marks, dtype=np.int64) if marks else None,
        )

    @staticmethod
    def joined(parts: Sequence["Samples[Any]"]) -> "Samples[Any]":
        """All parts' samples, in order."""
        first = parts[0]
        known = any(part.kinds is not None for part in parts)
        marks = [part.marks for part in parts if part.marks is not None]
        return Samples(
            first.layout,
            np.concatenate([part.ids for part in parts]),
            ends(np.concatenate([np.diff(part.offsets) for part in parts])),
            np.concatenate([part.labels for part in parts]),
            ends(np.concatenate([np.diff(_offsets(part)) for part in parts])) if first.layout == "target" else None,
            np.concatenate([part.every_kind for part in parts]) if known else None,
            np.concatenate(marks) if marks else None,
        )

    @property
    def every_kind(self) -> Ints:
        """Each sample's kind, −1 for none."""
        return np.full(len(self), -1, dtype=np.int32) if self.kinds is None else self.kinds

    @property
    def lengths(self) -> NDArray[np.int64]:
        """What each counts in a batch, [n]: its tokens; for an encoder-decoder those of its target too, which are padded beside them."""
        lengths: NDArray[np.int64] = np.diff(self.offsets)
        return lengths + np.diff(_offsets(self)) if self.layout == "target" else lengths

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, k: int) -> Sample: ...
    @overload
    def __getitem__(self, k: slice) -> list[Sample]: ...
    def __getitem__(self, k: int | slice) -> Sample | list[Sample]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        n = len(self)
        k = int(k) + n if k < 0 else int(k)
        if not 0 <= k < n:
            raise IndexError(f"sample {k} of {n}")
        ids = self.ids[self.offsets[k] : self.offsets[k + 1]].tolist()
        kind = None if self.kinds is None or self.kinds[k] < 0 else int(self.kinds[k])
        made: Any
        if self.layout == "class":
            made = Labeled(ids, int(self.labels[k]), kind)
        else:
            at = _offsets(self)
            mark = None if self.marks is None else int(self.marks[k])
            made = Encoded(ids, self.labels[at[k] : at[k + 1]].tolist(), kind, mark)
        return made  # type: ignore[no-any-return]


def ends(lengths: Iterable[int] | Ints) -> NDArray[np.int64]:
    """Offsets [n + 1] of pieces of so many entries."""
    sizes = lengths if isinstance(lengths, np.ndarray) else np.fromiter(lengths, dtype=np.int64)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])


def gathered(parts: Iterable[tuple[Samples[Any], Counts]], layout: Layout) -> tuple[Samples[Any], Counts]:
    """All parts' samples in memory, and their counts together."""
    kept, counts = [Samples.of([], layout)], Counts()
    for samples, more in parts:
        kept.append(samples)
        counts += more
    return Samples.joined(kept), counts


def _offsets(samples: Samples[Any]) -> Ints:
    return samples.offsets if samples.label_offsets is None else samples.label_offsets
