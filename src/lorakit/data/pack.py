"""Exact packing: several documents in one window, with the logits and gradients that each has alone. No flash-attention needed.

Position ids restart at every document. Given those, no attention mask and no cache, Transformers 5 lets every token attend
within its own document only, for eager, sdpa, flex and flash attention, sliding windows included. Two things undo this in
silence, as its mask then ignores the position ids: `use_cache=True`, the default of most models, and a 2-D attention mask.
So a batch says `use_cache=False` and has no mask. (A 4-D mask would need no such care, but it replaces a sliding window's own.)
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from lorakit.core.errors import DataError
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.samples import Samples, ends


@dataclass(frozen=True, slots=True)
class Packed:
    """One window of whole documents; the first label of each is ignored, so the shifted loss never crosses two."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    kinds: list[int] | None = None
    """Each token's kind of sample, where every document has one."""

    @property
    def documents(self) -> int:
        """How many documents the window holds."""
        return self.position_ids.count(0)


@dataclass(frozen=True, eq=False, repr=False)
class Windows(Sequence[Packed]):
    """Windows over samples, made when they are asked for: what is held is which samples are in which, 4 bytes a sample and 8 a window.

    A slice is a list. `members` [samples], the samples' numbers, window by window; window k's are offsets[k] to offsets[k + 1].
    """

    samples: Sequence[Encoded]
    members: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Each window's tokens."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, k: int) -> Packed: ...
    @overload
    def __getitem__(self, k: slice) -> list[Packed]: ...
    def __getitem__(self, k: int | slice) -> Packed | list[Packed]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        n = len(self)
        k = int(k) + n if k < 0 else int(k)
        if not 0 <= k < n:
            raise IndexError(f"window {k} of {n}")
        return _window([self.samples[i] for i in self.members[self.offsets[k] : self.offsets[k + 1]].tolist()])


def pack(samples: Sequence[Encoded], length: int) -> Windows:
    """Windows of at most `length` tokens, by best fit decreasing; deterministic, and every sample lies whole in one window.

    Within a window the documents keep the order of `samples`. DataError for an empty sample or one longer than the window.
    """
    sizes, labels = _sizes(samples)
    wrong = np.flatnonzero((sizes < 1) | (sizes > length) | (sizes != labels))
    if len(wrong):
        i = int(wrong[0])
        if not 1 <= sizes[i] <= length:
            raise DataError(f"sample {i} has {sizes[i]} tokens and the window holds {length}; tokenize with max_length={length}")
        raise DataError(f"sample {i} has {sizes[i]} tokens but {labels[i]} labels: encoder-decoder samples cannot be packed; use pad")
    window = _best_fit(sizes, length)
    members = np.argsort(window, kind="stable").astype(np.int32)
    offsets = ends(np.bincount(window))
    return Windows(samples, members, offsets, np.add.reduceat(sizes[members], offsets[:-1]))


def _sizes(samples: Sequence[Encoded]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each sample's tokens and labels, without making them where that is known."""
    if isinstance(samples, Samples):
        return np.diff(samples.offsets), np.diff(samples.offsets if samples.label_offsets is None else samples.label_offsets)
    pairs = np.asarray([(len(s.input_ids), len(s.labels)) for s in samples], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def collate(windows: Sequence[Packed], *, length: int | None = None, pad_id: int = 0) -> dict[str, Any]:
    """A batch for `model(**batch)`: input_ids, labels, position_ids, each [batch, length], and use_cache=False. Where the samples have
    kinds, also `kinds` [batch, length], −1 at padding, which is no argument of the model: see train/kinds.py.

    Windows are filled up to `length`, by default the longest one's. Each padding token is a document of its own at position 0:
    it attends to itself, so no row of the attention is empty (which gives NaN) and no position leaves a learned table.
    """
    longest = max(len(window.input_ids) for window in windows)
    if length is not None and longest > length:
        raise DataError(f"a window has {longest} tokens; the batch was asked to be {length} long")
    width = length or longest
    return {
        "input_ids": filled([w.input_ids for w in windows], pad_id, width),
        "labels": filled([w.labels for w in windows], IGNORED, width),
        "position_ids": filled([w.position_ids for w in windows], 0, width),
        "use_cache": False,
        **kinds_of([w.kinds for w in windows], width),
    }


def kinds_of(rows: Sequence[Sequence[int] | None], width: int) -> dict[str, torch.Tensor]:
    """`kinds` [len(rows), width], −1 at padding; nothing unless every row has them."""
    known = [row for row in rows if row is not None]
    return {"kinds": filled(known, -1, width)} if len(known) == len(rows) else {}


def filled(rows: Sequence[Sequence[int]], value: int, width: int) -> torch.Tensor:
    """int64 [len(rows), width]: the rows, continued with `value` on the right."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


def fill(windows: Windows, length: int) -> float:
    """The share of all window places that hold a token, in (0, 1]."""
    return int(windows.lengths.sum()) / (length * len(windows))


def _window(documents: Sequence[Encoded]) -> Packed:
    return Packed(
        [token for d in documents for token in d.input_ids],
        [label for d in documents for label in (IGNORED, *d.labels[1:])],
        [position for d in documents for position in range(len(d.input_ids))],
        None if any(d.kind is None for d in documents) else [d.kind for d in documents for _ in d.input_ids],  # type: ignore[misc]
    )


def _best_fit(sizes: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """Each item's window. Longest first, each item goes where the least room is left; equals in order of appearance."""
    window_of = np.empty(len(sizes), dtype=np.int32)
    with_room: dict[int, deque[int]] = {}  # room left -> windows, oldest first
    rooms: list[int] = []  # the keys of with_room, ascending: there are at most `length`
    windows = 0
    order = np.argsort(-sizes, kind="stable").astype(np.int32)
    for start in range(0, len(order), 1 << 16):  # Python's numbers take more room than numpy's
        some = order[start : start + (1 << 16)]
        chosen = []
        for size in sizes[some].tolist():
            at = bisect_left(rooms, size)
            if at == len(rooms):
                room, number = length, windows
                windows += 1
            else:
                room = rooms[at]
                number = with_room[room].popleft()
                if not with_room[room]:
                    del with_room[room], rooms[at]
            chosen.append(number)
            if left := room - size:
                if left not in with_room:
                    insort(rooms, left)
                with_room.setdefault(left, deque()).append(number)
        window_of[some] = chosen
    return window_of
