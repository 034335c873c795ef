"""Which items the next batch holds: an endless stream of epochs, each its own permutation, with one integer of state.

Item k of the stream is permutation(seed, k // n)[k mod n]. A step takes the next `batch_size` items for all ranks together, and
rank r of w keeps every w-th from the r-th on, so the union over ranks is the single-process batch whatever w is.
"""

from collections.abc import Iterator
from typing import Any

import torch

from lorakit.core.errors import CheckpointError, DataError
from lorakit.core.random import generator


class Batches(Iterator[list[int]]):
    """Endless batches of item numbers. Every item comes once per epoch; a batch may span the end of an epoch.

    Args:
        n_items: how many items there are.
        batch_size: items per step, all ranks together; divisible by `world`.
        seed: decides the order.
        rank, world: this process and how many there are.
    """

    def __init__(self, n_items: int, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if n_items < 1 or batch_size < 1:
            raise DataError(f"{n_items} items in batches of {batch_size}: both must be at least 1")
        if batch_size % world or not 0 <= rank < world:
            raise DataError(f"rank {rank} of {world} with a batch of {batch_size}: the batch must be divisible by the number of ranks")
        self.n_items, self.batch_size, self.seed, self.rank, self.world = n_items, batch_size, seed, rank, world
        self.position = 0  # items given out so far, all ranks together
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> float:
        """Epochs done so far, with their fraction."""
        return self.position / self.n_items

    def __next__(self) -> list[int]:
        """This rank's items of the next step, `batch_size / world` of them."""
        mine = range(self.position + self.rank, self.position + self.batch_size, self.world)
        batch = [self._item(k) for k in mine]
        self.position += self.batch_size
        return batch

    def _item(self, k: int) -> int:
        epoch, index = divmod(k, self.n_items)
        if self._order[0] != epoch:
            self._order = (epoch, permutation(self.n_items, self.seed, epoch))
        return self._order[1][index]

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and what makes it this stream. Batch size and world may differ on resuming."""
        return {"position": self.position, "n_items": self.n_items, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; CheckpointError if the data or the seed is another."""
        for key, mine in (("n_items", self.n_items), ("seed", self.seed)):
            if state[key] != mine:
                raise CheckpointError(
                    f"the data order was saved with {key}={state[key]} but this run has {key}={mine}; resume with the same data and seed"
                )
        self.position = int(state["position"])


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch, a function of (n, seed, epoch) on every machine."""
    order: list[int] = torch.randperm(n, generator=generator(seed, f"epoch:{epoch}")).tolist()
    return order
