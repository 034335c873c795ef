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
from typing import Any

import torch

from lorakit.core.errors import DataError
from lorakit.data.encoded import IGNORED, Encoded


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


def pack(samples: Sequence[Encoded], length: int) -> list[Packed]:
    """Windows of at most `length` tokens, by best fit decreasing; deterministic, and every sample lies whole in one window.

    Within a window the documents keep the order of `samples`. DataError for an empty sample or one longer than the window.
    """
    sizes = [len(sample.input_ids) for sample in samples]
    for i, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        if not 1 <= size <= length:
            raise DataError(f"sample {i} has {size} tokens and the window holds {length}; tokenize with max_length={length}")
        if len(sample.labels) != size:
            raise DataError(
                f"sample {i} has {size} tokens but {len(sample.labels)} labels: encoder-decoder samples cannot be packed; use pad"
            )
    return [_window([samples[i] for i in sorted(members)]) for members in _best_fit(sizes, length)]


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


def fill(windows: Sequence[Packed], length: int) -> float:
    """The share of all window places that hold a token, in (0, 1]."""
    return sum(len(window.input_ids) for window in windows) / (length * len(windows))


def _window(documents: Sequence[Encoded]) -> Packed:
    return Packed(
        [token for d in documents for token in d.input_ids],
        [label for d in documents for label in (IGNORED, *d.labels[1:])],
        [position for d in documents for position in range(len(d.input_ids))],
        None if any(d.kind is None for d in documents) else [d.kind for d in documents for _ in d.input_ids],  # type: ignore[misc]
    )


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Members of each window. Longest first, each item goes where the least room is left; equals in order of appearance."""
    windows: list[list[int]] = []
    with_room: dict[int, deque[int]] = {}  # room left -> windows, oldest first
    rooms: list[int] = []  # the keys of with_room, ascending: there are at most `length`
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(rooms, sizes[item])
        room = rooms[at] if at < len(rooms) else length
        if at == len(rooms):
            number = len(windows)
            windows.append([])
        else:
            number = with_room[room].popleft()
            if not with_room[room]:
                del with_room[room], rooms[at]
        windows[number].append(item)
        if left := room - sizes[item]:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, deque()).append(number)
    return windows
