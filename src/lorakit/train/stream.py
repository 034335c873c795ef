"""The training items as a run takes them: a step's micro-batches, endlessly, from all of them or from a share."""

from collections.abc import Iterator

from lorakit.core.calibrate import Calibration
from lorakit.core.errors import DataError
from lorakit.data.sampler import Batches, permutation
from lorakit.train.config import TrainConfig
from lorakit.train.dataset import Batch, Side
from lorakit.train.distributed import World
from lorakit.train.evaluate import to
from lorakit.train.metrics import forward_loss


class Stream(Iterator[list[Batch]]):
    """One step's micro-batches of this process, from the share [lo, hi) of a fixed shuffle. Its state is the sampler's."""

    def __init__(self, side: Side, config: TrainConfig, world: World, lo: float, hi: float) -> None:
        self.config, self.world, self.share = config, world, (lo, hi)
        self.turn(side)

    def turn(self, side: Side) -> None:
        """Take the items of this side from now on, from their beginning."""
        n, (lo, hi), config, world = len(side.items), self.share, self.config, self.world
        order = range(n) if (lo, hi) == (0.0, 1.0) else permutation(n, config.seed, -1)
        self.mine = order[round(lo * n) : round(hi * n)]
        if not self.mine:
            raise DataError(f"a share of {hi - lo:.0%} of {n} training items holds none; give more data")
        self.side, self.size, self.device = side, config.per_device_train_batch_size, world.device
        batch = self.size * config.gradient_accumulation_steps * world.size
        lengths = side.lengths[self.mine] if config.group_by_length else None
        self.sampler = Batches(len(self.mine), batch, lengths=lengths, seed=config.seed, rank=world.rank, world=world.size)

    def __next__(self) -> list[Batch]:
        items = [self.side.items[self.mine[k]] for k in next(self.sampler)]
        return [to(self.side.collate(items[i : i + self.size]), self.device) for i in range(0, len(items), self.size)]


def calibration(side: Side, config: TrainConfig, world: World, batches: int) -> Calibration:
    """The first so many batches of a side's items in a fixed shuffle (0: all of them), each process its share of them, and the training
    loss; a loss with a reference compares the model with itself, which gives the gradient of the first step. Under a sharded base, whose
    every forward is a common one, all processes run all batches."""
    size, items = config.per_device_train_batch_size, side.items
    order = permutation(len(items), config.seed, -2)[: batches * size or None]
    chosen = [[items[k] for k in order[i : i + size]] for i in range(0, len(order), size)]
    mine = chosen if world.sharded else chosen[world.rank :: world.size]
    loss = forward_loss if side.aim is None else side.aim.on
    return Calibration([to(side.collate(some), world.device) for some in mine], loss, world.total_)
