"""One training run under somebody else's `transformers.Trainer`: the step's events in their order, and what parts of a method ask for.

    Trainer.training_step, first of a step         before_forward; the step's rate times the controllers' factors
    every one                                      forward and backward, masks from (seed, number of the micro-batch)
    the last (Accelerator.sync_gradients)          mean over the processes · penalties · after_backward
    on_pre_optimizer_step                          gradients are clipped: by how much is measured
    on_optimizer_step                              after_step; the rate as it was, on which the Trainer's scheduler goes on

The Trainer scales every micro-batch so that the sum of their gradients is the mean loss's, whatever the loss; a penalty's gradient is added
to that once, as it is. Across processes gradients are averaged here, in one all-reduce, and not by DistributedDataParallel, which holds on
to parameters that a growing adapter exchanges.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.core.attach import Adapted
from lorakit.core.calibrate import Calibration
from lorakit.core.errors import CheckpointError, Incompatible
from lorakit.core.events import MicroBatches, Scored, Step, Task
from lorakit.core.params import Param
from lorakit.data.sampler import Batches, permutation
from lorakit.parts.posterior.fit import Laplace
from lorakit.train.distributed import World
from lorakit.train.metrics import forward_loss, forward_scored
from lorakit.train.run import check_reached
from lorakit.train.state import random_state, restore_random

if TYPE_CHECKING:
    from lorakit.train.outside import AdapterTrainerMixin

Row = Any
"""An item of the Trainer's data set, as its collator takes it."""


class OutsideRun:
    """core.events.Run for one call of `Trainer.train`. `state`: of a checkpoint to go on from."""

    def __init__(self, trainer: "AdapterTrainerMixin", state: Mapping[str, Any] | None = None) -> None:
        self.trainer, self.adapted = trainer, trainer.adapted
        (name,) = self.adapted.active
        self.method = self.adapted.methods[name]
        accelerator = trainer.accelerator
        self.world = World(accelerator.process_index, accelerator.num_processes, accelerator.device, sharded=False)
        self.streams: list[_Stream] = []
        self.micro = 0
        """Micro-batches of the present step so far."""
        self.ready = False
        """Whether the step's gradients are complete."""
        self.norm = 0.0
        self.clip = 1.0
        self.rates: list[float] = []
        _same_everywhere(self.adapted, name, self.world)
        self.controllers = [spec.build(self) for spec in self.method.controllers]
        if any(isinstance(spec, Laplace) for spec in self.method.controllers):
            self.calibration(1)  # what it asks for in the end is refused now
        if state is None:
            for controller in self.controllers:
                controller.start()
            for controller in self.controllers:
                controller.before_task(Task(0, 1))
        else:
            self._load(state)

    # --- the events of a step ---------------------------------------------------------------------------------------------

    @property
    def info(self) -> Step:
        """The present step."""
        return Step(self.trainer.state.global_step, self.total)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one forward and backward of the Trainer."""
        if not self.micro:
            self._before_forward()
        with self.adapted.given(step=self._number(self.micro), seed=self.trainer.args.seed):
            yield
        self.micro += 1
        if self.trainer.accelerator.sync_gradients:
            self._after_backward()

    def clipped(self) -> None:
        """The gradients are as the optimizer will see them. Raises Incompatible where no step led to this one."""
        if not self.ready:
            raise Incompatible(
                f"{type(self.trainer).__name__} steps the optimizer before its last micro-batch went through `training_step` with "
                "Accelerator.sync_gradients set; penalties and controllers would be left out"
            )
        if self.controllers:
            now = self._norm()
            self.clip = now / self.norm if self.norm > 0 and math.isfinite(now / self.norm) else 1.0

    def stepped(self) -> None:
        """The optimizer has stepped; gradients are still alive."""
        done = Step(self.info.index, self.total, self.clip)
        for controller in self.controllers:
            controller.after_step(done)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.micro, self.ready = 0, False

    def finish(self) -> None:
        """After the last step: what the adapter is saved as."""
        self.adapted.model.eval()
        for controller in self.controllers:
            controller.after_task(Task(0, 1))
        for controller in self.controllers:
            controller.finish()

    def _before_forward(self) -> None:
        info = self.info
        for controller in self.controllers:
            controller.before_forward(info)
        factor = math.prod(controller.rate(info) for controller in self.controllers)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _after_backward(self) -> None:
        rows = list(self.adapted.params())
        if self.info.index == 0:
            check_reached(rows)
        self._complete(rows)
        for controller in self.controllers:
            controller.after_backward(self.info)
        if self.controllers:
            self.norm = self._norm()
        self.ready = True

    def _complete(self, rows: Sequence[Param]) -> None:
        """The mean over all processes, and the penalties' gradients."""
        if self.world.size > 1:
            reached = torch.tensor([float(row.tensor.grad is not None) for row in rows], device=self.world.device)
            self.world.sum_([reached])
            for row in itertools.compress(rows, reached.tolist()):
                if row.tensor.grad is None:
                    row.tensor.grad = torch.zeros_like(row.tensor)
            grads = [row.tensor.grad for row in rows if row.tensor.grad is not None]
            self.world.sum_(grads)
            if grads:
                torch._foreach_mul_(grads, 1 / self.world.size)
        for penalty in self.method.penalties:
            penalty(self.adapted, self.adapted.context).backward()

    def _norm(self) -> float:
        grads = [row.tensor.grad for row in self.adapted.params() if row.tensor.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _number(self, i: int) -> int:
        """Of the present step's i-th micro-batch, among all of the run and of all processes (as train/run.py counts)."""
        return (self.info.index * self.trainer.args.gradient_accumulation_steps + i) * self.world.size + self.world.rank

    # --- what controllers ask for (core/events.py) ------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return self.trainer.state.max_steps

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The method's own, without Accelerate's wrapper."""
        from accelerate.optimizer import AcceleratedOptimizer

        found: Any = self.trainer.optimizer
        return found.optimizer if isinstance(found, AcceleratedOptimizer) else found  # type: ignore[no-any-return]

    @property
    def processes(self) -> int:
        """How many processes the run has."""
        return self.world.size

    def total_(self, tensor: Tensor) -> None:
        """Sum a statistic over all processes, in place."""
        self.world.total_(tensor)

    def stream(self, lo: float = 0.0, hi: float = 1.0) -> Iterator[MicroBatches]:
        """The training data, endlessly, in an order of its own beside the Trainer's."""
        self.streams.append(_Stream(self, lo, hi))
        return self.streams[-1]

    def gradients(self, batches: MicroBatches, info: Step) -> tuple[float, int]:
        """Add the gradients of the Trainer's own loss on these batches, and of the penalties; (mean loss, 1)."""
        trainer, rows = self.trainer, list(self.adapted.params())
        before = [row.tensor.grad for row in rows]
        for row in rows:
            row.tensor.grad = None
        steps = getattr(trainer, "current_gradient_accumulation_steps", 1)
        samples, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(samples)
        loss = 0.0
        for i, batch in enumerate(samples):
            with self.adapted.given(step=self._number(i), seed=trainer.args.seed):
                loss += float(trainer.plain_step(dict(batch), items))
        trainer.current_gradient_accumulation_steps = steps
        self._complete(rows)
        for row, earlier in zip(rows, before, strict=True):
            if earlier is not None:
                row.tensor.grad = earlier if row.tensor.grad is None else earlier.add_(row.tensor.grad)
        return loss, 1

    @torch.no_grad()
    def loss(self, batches: MicroBatches, info: Step) -> tuple[float, int]:
        """(summed nats, tokens) over all processes, without a graph."""
        nats = tokens = 0.0
        for i, batch in enumerate(batches):
            with self.adapted.given(step=self._number(i), seed=self.trainer.args.seed):
                loss, n = forward_loss(self.adapted.model, _labeled(batch))
            nats, tokens = nats + loss.item(), tokens + n
        nats, tokens = self.world.total(nats, tokens)
        return nats, int(tokens)

    def update(self, info: Step) -> None:
        """The Trainer steps; nobody else."""
        raise Incompatible("a Trainer makes its steps itself; train a method with a loop of its own by `lorakit train`")

    def scored(self, batch: Mapping[str, Any]) -> Scored:
        """One plain forward of a batch, with its graph."""
        return forward_scored(self.adapted.model, _labeled(batch))

    def calibration(self, batches: int) -> Calibration:
        """The first so many batches of the Trainer's training data in a fixed shuffle (0: all of it), shared among the processes."""
        with undisturbed():
            items, collate = self.items()
            size = self.trainer.args.train_batch_size
            order = permutation(len(items), self.trainer.args.seed, -2)[: batches * size or None]
            chosen = [order[i : i + size] for i in range(0, len(order), size)][self.world.rank :: self.world.size]
            made = [_labeled(self.collated(items, collate, some)) for some in chosen]
        return Calibration(made, forward_loss, self.world.total_)

    def items(self) -> tuple[Any, Callable[[list[Row]], Any]]:
        """The Trainer's training items and its collator, both without the columns that it leaves out."""
        loader = self.trainer.get_train_dataloader()
        data: Any = loader.dataset
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise Incompatible(
                f"{self.adapted.active[0]!r} reads training data out of turn, and this data set is a stream; give one with a length"
            )
        return data, loader.collate_fn

    def collated(self, items: Any, collate: Callable[[list[Row]], Any], numbers: Sequence[int]) -> dict[str, Any]:
        """One batch on the run's device."""
        return dict(self.trainer._prepare_inputs(collate([items[k] for k in numbers])))

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the adapter and what the Trainer writes."""
        return {"controllers": [c.state_dict() for c in self.controllers], "streams": [s.sampler.state_dict() for s in self.streams]}

    def _load(self, state: Mapping[str, Any]) -> None:
        if len(state["controllers"]) != len(self.controllers) or len(state["streams"]) != len(self.streams):
            raise CheckpointError("the checkpoint is another method's: it has other controllers; attach the method that it was made with")
        for controller, saved in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state_dict(saved)
        for stream, position in zip(self.streams, state["streams"], strict=True):
            stream.sampler.load_state_dict(position)


class _Stream(Iterator[list[dict[str, Any]]]):
    """One step's micro-batches of this process, from the share [lo, hi) of a fixed shuffle of the items."""

    def __init__(self, run: OutsideRun, lo: float, hi: float) -> None:
        args, world = run.trainer.args, run.world
        with undisturbed():
            self.items, self.collate = run.items()
        n = len(self.items)
        order = list(range(n)) if (lo, hi) == (0.0, 1.0) else permutation(n, args.seed, -1)
        self.mine, self.run, self.size = order[round(lo * n) : round(hi * n)], run, args.train_batch_size
        batch = self.size * args.gradient_accumulation_steps * world.size
        self.sampler = Batches(len(self.mine), batch, seed=args.seed, rank=world.rank, world=world.size)

    def __next__(self) -> list[dict[str, Any]]:
        numbers = [self.mine[k] for k in next(self.sampler)]
        with undisturbed():
            cut = [numbers[i : i + self.size] for i in range(0, len(numbers), self.size)]
            return [self.run.collated(self.items, self.collate, some) for some in cut]


@contextmanager
def undisturbed() -> Iterator[None]:
    """A look at the data that leaves the global generators as they were: the run's own order must not follow from it."""
    import numpy as np

    state, numbers = random_state(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield
    finally:
        restore_random(state)
        np.random.set_state(numbers)


def _labeled(batch: Mapping[str, Any]) -> dict[str, Any]:
    if "labels" not in batch:
        raise Incompatible(f"this method looks at the loss of training batches, and the Trainer's have no labels, only {sorted(batch)}")
    return dict(batch)


def _same_everywhere(adapted: Adapted, name: str, world: World) -> None:
    """Every process begins with the first one's adapter, as under DistributedDataParallel."""
    if world.size == 1:
        return
    tensors = [tensor for _, tensor in sorted(adapted.tensors(name).items())]
    numel = torch.tensor([float(sum(t.numel() for t in tensors))], dtype=torch.float64, device=world.device)
    mine = float(numel)
    world.sum_([numel])
    if float(numel) != mine * world.size:
        raise Incompatible("the processes' adapters differ in shape; attach with the same method, seed and calibration batches everywhere")
    with torch.no_grad():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)
