"""A reference training loop: one optimizer step as core/events.py orders it, with exact state. Laws and acceptance tests step with it."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import Adapted
from lorakit.core.calibrate import Calibration
from lorakit.core.events import Controller, Scored, Step, Task
from lorakit.parts.optimizers.adamw import AdamW
from tests.laws.subject import batch, calibration, loss_of


def idle(adapted: Adapted, total: int) -> Any:
    """Just enough of a run to build a controller of."""
    return SimpleNamespace(adapted=adapted, total=total, optimizer=torch.optim.SGD([p.tensor for p in adapted.params()], lr=1e-2))


class Stream(Iterator[list[dict[str, Any]]]):
    """Micro-batches by their number; two streams of one run share none."""

    def __init__(self, data: Callable[[int], Tensor], offset: int) -> None:
        self.data, self.offset, self.position = data, offset, 0

    def __next__(self) -> list[dict[str, Any]]:
        self.position += 1
        return [{"input_ids": self.data(self.position - 1 + self.offset)}]


class Run:
    """`total` steps of the active method. `data(i)`: step i's batch; `loss(model, batch)`: its mean loss; `reduce(grads)`: what processes
    do together; `tasks`: how many in sequence, with a `border` between two; `shown(task)`: a task's data for statistics. It is a
    `core.events.Run` for the controllers and the loop."""

    def __init__(
        self,
        adapted: Adapted,
        *,
        total: int,
        lr: float = 1e-2,
        clip: float = 1.0,
        data: Callable[[int], Tensor] = batch,
        loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
        reduce: Callable[[list[Tensor]], None] | None = None,
        tasks: int = 1,
        shown: Callable[[int], Calibration] = lambda task: calibration(8),
    ) -> None:
        self.task, self.shown = Task(0, tasks), shown
        (name,) = adapted.active
        self.adapted, self.method, self.total, self.clip = adapted, adapted.methods[name], total, clip
        self.data, self.loss_of, self.reduce, self.index, self.lr = data, loss, reduce, 0, lr
        self.streams: list[Stream] = []
        self._make_optimizer()
        self.controllers: list[Controller] = [spec.build(self) for spec in self.method.controllers]
        self.loop = self.method.loop.build(self)
        for c in self.controllers:
            c.start()
        for c in self.controllers:
            c.before_task(self.task)

    def _make_optimizer(self) -> None:
        self.optimizer: torch.optim.Optimizer = (self.method.optim or AdamW()).build(self.adapted.params(), lr=self.lr)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step(self) -> Tensor:
        """One optimizer step; the loss without penalties."""
        self.adapted.model.train()
        info = Step(self.index, self.total)
        for c in self.controllers:
            c.before_forward(info)
        rate = math.prod(c.rate(info) for c in self.controllers)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        nats, n = self.loop.step(info)
        self.index += 1
        return torch.tensor(nats / n, dtype=torch.float64)

    def stream(self, lo: float = 0.0, hi: float = 1.0) -> Stream:
        self.streams.append(Stream(self.data, 1000 * len(self.streams)))
        return self.streams[-1]

    def gradients(self, batches: list[dict[str, Any]], info: Step) -> tuple[float, int]:
        (batch,) = batches
        with self.adapted.given(step=info.index):
            loss, shown = self._loss(batch, info)
            penalties = [penalty(self.adapted, self.adapted.context) for penalty in self.method.penalties]
            whole = sum(penalties, loss)
            if whole.requires_grad:  # a method may leave out the whole backward pass of a step
                whole.backward()
        if self.reduce is not None:
            self.reduce([p.tensor.grad for p in self.adapted.params() if p.tensor.grad is not None])
        return shown, 1

    def _loss(self, batch: dict[str, Any], info: Step) -> tuple[Tensor, float]:
        """(training loss, plain loss)."""
        model, ids = self.adapted.model, batch["input_ids"]
        if self.method.objective is None:
            loss = self.loss_of(model, ids)
            return loss, loss.item()
        done: list[Scored] = []

        def score(k: int) -> Scored:
            with self.adapted.given(step=info.index, seed=k << 32):
                out = model(input_ids=ids, labels=ids)
            kept = torch.ones_like(ids, dtype=torch.bool)
            kept[:, -1] = False
            n = int(kept.sum())
            done.append(Scored(out.loss * n, n, out.logits, kept))
            return done[-1]

        loss, n = self.method.objective(score, self.adapted)
        return loss / n, done[0].loss.item() / done[0].n

    @torch.no_grad()
    def loss(self, batches: list[dict[str, Any]], info: Step) -> tuple[float, int]:
        (batch,) = batches
        with self.adapted.given(step=info.index):
            found = torch.tensor([self._loss(batch, info)[1]], dtype=torch.float64)
        self.total_(found)
        return found.item(), 1

    def update(self, info: Step) -> None:
        tensors = [p.tensor for p in self.adapted.params()]
        for c in self.controllers:
            c.after_backward(info)
        norm = torch.nn.utils.clip_grad_norm_(tensors, self.clip)
        factor = min(1.0, self.clip / (norm.item() + 1e-6))
        self.optimizer.step()
        for c in self.controllers:
            c.after_step(Step(info.index, info.total, factor))
        self.optimizer.zero_grad()

    processes = 1

    def scored(self, batch: dict[str, Any]) -> Scored:
        out, ids = self.adapted.model(**batch), batch["input_ids"]
        kept = torch.ones_like(ids, dtype=torch.bool)
        return Scored(out.loss * ids.numel(), ids.numel(), out.logits, kept)

    def total_(self, tensor: Tensor) -> None:
        if self.reduce is not None:
            self.reduce([tensor])

    def calibration(self, batches: int) -> Calibration:
        data = self.shown(self.task.index)
        return replace(data, batches=data.batches[: batches or None])

    def border(self) -> "Run":
        """From one task to the next."""
        for c in self.controllers:
            c.after_task(self.task)
        self.task = Task(self.task.index + 1, self.task.count)
        self._make_optimizer()
        for c in self.controllers:
            c.before_task(self.task)
        return self

    def steps(self, n: int) -> "Run":
        for _ in range(n):
            self.step()
        return self

    def finish(self) -> Adapted:
        for c in self.controllers:
            c.after_task(self.task)
        for c in self.controllers:
            c.finish()
        self.adapted.model.eval()
        return self.adapted

    def state(self) -> bytes:
        """Everything that the next step depends on, written and safe to read back (weights_only)."""
        (name,) = self.adapted.active
        buffer = io.BytesIO()
        parts = {"adapter": dict(self.adapted.state(name).tensors), "optimizer": self.optimizer.state_dict(), "index": self.index}
        parts |= {"streams": [s.position for s in self.streams], "loop": self.loop.state_dict(), "task": self.task.index}
        torch.save(parts | {"controllers": [c.state_dict() for c in self.controllers]}, buffer)
        return buffer.getvalue()

    def restore(self, state: bytes) -> "Run":
        (name,) = self.adapted.active
        parts = torch.load(io.BytesIO(state), weights_only=True)
        self.task = Task(parts["task"], self.task.count)
        self.adapted.fit(name, parts["adapter"])
        self.adapted.load_tensors(name, parts["adapter"])
        self._make_optimizer()
        self.optimizer.load_state_dict(parts["optimizer"])
        for c, saved in zip(self.controllers, parts["controllers"], strict=True):
            c.load_state_dict(saved)
        self.loop.load_state_dict(parts["loop"])
        for stream, position in zip(self.streams, parts["streams"], strict=True):
            stream.position = position
        self.index = parts["index"]
        return self
