"""Which items the next batch holds: an endless stream of epochs, each its own permutation, with one integer of state.

Item k of the stream is order(seed, k // n)[k mod n]. A step takes the next `batch_size` items for all ranks together, and rank r of w
keeps every w-th from the r-th on, so the union over ranks is the single-process batch whatever w is.

Given the items' lengths, an epoch's order is made of runs of neighbors in length, each as long as a batch, in random order (see
`grouped`). A step's items then come longest first, so that micro-batches and ranks get neighbors too.

Which samples share a step is then no longer independent of their lengths, and nothing else changes: each is still seen once an epoch, and
the loss of a step is still the sum over its tokens divided once by their number. A token of a short sample shares its step with fewer
others, so it weighs more in that step, as it does in any step that happens to draw short samples.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorakit.core.errors import CheckpointError, DataError
from lorakit.core.random import generator

SORTED = 50
"""Batches' worth of items that are sorted at a time: enough to fill a batch with equals, few enough to draw others in every epoch."""


class Batches(Iterator[list[int]]):
    """Endless batches of item numbers. Every item comes once per epoch; a batch may span the end of an epoch.

    Args:
        n_items: how many items there are.
        batch_size: items per step, all ranks together; divisible by `world`.
        lengths: of each item; items of similar length then share a batch. None: a batch is drawn blindly.
            With them the order takes 24 bytes an item, without 8.
        seed: decides the order.
        rank, world: this process and how many there are.
    """

    def __init__(
        self,
        n_items: int,
        batch_size: int,
        *,
        lengths: Sequence[int] | NDArray[np.int64] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if n_items < 1 or batch_size < 1:
            raise DataError(f"{n_items} items in batches of {batch_size}: both must be at least 1")
        if batch_size % world or not 0 <= rank < world:
            raise DataError(f"rank {rank} of {world} with a batch of {batch_size}: the batch must be divisible by the number of ranks")
        if lengths is not None and len(lengths) != n_items:
            raise DataError(f"{len(lengths)} lengths for {n_items} items: each needs one")
        self.n_items, self.batch_size, self.seed, self.rank, self.world = n_items, batch_size, seed, rank, world
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.group = 0 if lengths is None else batch_size  # so many neighbors in the order are of similar length
        self.position = 0  # items given out so far, all ranks together
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))

    @property
    def epoch(self) -> float:
        """Epochs done so far, with their fraction."""
        return self.position / self.n_items

    def __next__(self) -> list[int]:
        """This rank's items of the next step, `batch_size / world` of them."""
        batch = [self._item(k) for k in range(self.position, self.position + self.batch_size)]
        if self.lengths is not None:
            batch.sort(key=self.lengths.__getitem__, reverse=True)  # stable
        self.position += self.batch_size
        return batch[self.rank :: self.world]

    def _item(self, k: int) -> int:
        epoch, index = divmod(k, self.n_items)
        if self._order[0] != epoch:
            self._order = (epoch, self._ordered(epoch))
        return int(self._order[1][index])

    def _ordered(self, epoch: int) -> NDArray[np.int64]:
        if self.lengths is None:
            return _shuffled(self.n_items, self.seed, f"epoch:{epoch}")
        return _grouped(self.lengths, self.group, self.seed, epoch)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and what makes it this stream. Batch size and world may differ on resuming."""
        return {"position": self.position, "n_items": self.n_items, "seed": self.seed, "group": self.group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; CheckpointError if the data or the seed is another, or grouping was switched on or off."""
        for key, mine in (("n_items", self.n_items), ("seed", self.seed)):
            if state[key] != mine:
                raise CheckpointError(
                    f"the data order was saved with {key}={state[key]} but this run has {key}={mine}; resume with the same data and seed"
                )
        if (state["group"] > 0) != (self.group > 0):
            raise CheckpointError(f"the data order was saved with group_by_length={state['group'] > 0}; resume with the same")
        self.position, self.group = int(state["position"]), int(state["group"])  # the order stays, whatever the batch size is now
        self._order = (-1, self._order[1])


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch, a function of (n, seed, epoch) on every machine."""
    return [int(item) for item in _shuffled(n, seed, f"epoch:{epoch}")]


def grouped(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[int]:
    """An epoch's order in which batches of `size` hold items of similar length: a function of its arguments on every machine.

    The epoch is shuffled, cut into parts of SORTED batches (fewer where there would be less than two parts), each part is sorted by length
    and cut into batches, and those of all parts are shuffled. Batches start at multiples of `size` in the stream of epochs, not in this
    epoch. The two at its borders are partly a neighboring epoch's: both epochs take their share from the same place of the sorted lengths.
    """
    return [int(item) for item in _grouped(np.asarray(lengths), size, seed, epoch)]


def _grouped(lengths: NDArray[Any], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    n = len(lengths)
    order = _shuffled(n, seed, f"epoch:{epoch}")
    if n < 2 * size:
        return order
    head = -epoch * n % size
    tail = (n - head) % size
    first, rest = _near(order, lengths, head, _place(seed, epoch))
    last, rest = _near(rest, lengths, tail, _place(seed, epoch + 1))
    part = size * max(1, min(SORTED, n // (2 * size)))
    for i in range(0, len(rest), part):
        some = rest[i : i + part]
        rest[i : i + part] = some[np.argsort(lengths[some], kind="stable")]
    batches = rest.reshape(-1, size)[_shuffled(len(rest) // size, seed, f"batches:{epoch}")]
    return np.concatenate([first, batches.reshape(-1), last])


def _near(order: NDArray[np.int64], lengths: NDArray[Any], count: int, place: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`count` neighbors in length at a place in [0, 1) of the sorted lengths, and the others in their order."""
    start = round(place * (len(order) - count))
    chosen = np.argsort(lengths[order], kind="stable")[start : start + count]  # places in the order
    return order[chosen], np.delete(order, chosen)


def _place(seed: int, border: int) -> float:
    return torch.rand((), generator=generator(seed, f"border:{border}")).item()


def _shuffled(n: int, seed: int, what: str) -> NDArray[np.int64]:
    order: NDArray[np.int64] = torch.randperm(n, generator=generator(seed, what)).numpy()
    return order
