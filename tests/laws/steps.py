"""A reference training loop: one optimizer step as core/events.py orders it, with exact state. Laws and acceptance tests step with it."""

import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorakit import Adapted
from lorakit.core.events import Controller, Step
from lorakit.parts.optimizers.adamw import AdamW
from tests.laws.subject import batch, loss_of


class Run:
    """`total` steps of the active method. `data(i)`: step i's batch; `loss(model, batch)`; `reduce(grads)`: what processes do together."""

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
    ) -> None:
        (name,) = adapted.active
        self.adapted, self.method, self.total, self.clip = adapted, adapted.methods[name], total, clip
        self.data, self.loss, self.reduce, self.index = data, loss, reduce, 0
        self.optimizer: torch.optim.Optimizer = (self.method.optim or AdamW()).build(adapted.params(), lr=lr)
        self.controllers: list[Controller] = [spec.build(adapted, total) for spec in self.method.controllers]
        for c in self.controllers:
            c.start()

    def step(self) -> Tensor:
        """One optimizer step; the loss without penalties."""
        model: nn.Module = self.adapted.model.train()
        tensors = [p.tensor for p in self.adapted.params()]
        for c in self.controllers:
            c.before_forward(Step(self.index, self.total))
        with self.adapted.given(step=self.index):
            loss = self.loss(model, self.data(self.index))
            penalties = [penalty(self.adapted, self.adapted.context) for penalty in self.method.penalties]
            sum(penalties, loss).backward()
        if self.reduce is not None:
            self.reduce([t.grad for t in tensors if t.grad is not None])
        for c in self.controllers:
            c.after_backward(Step(self.index, self.total))
        norm = torch.nn.utils.clip_grad_norm_(tensors, self.clip)
        factor = min(1.0, self.clip / (norm.item() + 1e-6))
        self.optimizer.step()
        for c in self.controllers:
            c.after_step(Step(self.index, self.total, factor))
        self.optimizer.zero_grad()
        self.index += 1
        return loss.detach()

    def steps(self, n: int) -> "Run":
        for _ in range(n):
            self.step()
        return self

    def finish(self) -> Adapted:
        for c in self.controllers:
            c.finish()
        self.adapted.model.eval()
        return self.adapted

    def state(self) -> bytes:
        """Everything that the next step depends on, written and safe to read back (weights_only)."""
        (name,) = self.adapted.active
        buffer = io.BytesIO()
        parts = {"adapter": dict(self.adapted.state(name).tensors), "optimizer": self.optimizer.state_dict(), "index": self.index}
        torch.save(parts | {"controllers": [c.state_dict() for c in self.controllers]}, buffer)
        return buffer.getvalue()

    def restore(self, state: bytes) -> "Run":
        (name,) = self.adapted.active
        parts = torch.load(io.BytesIO(state), weights_only=True)
        self.adapted.load_tensors(name, parts["adapter"])
        self.optimizer.load_state_dict(parts["optimizer"])
        for c, saved in zip(self.controllers, parts["controllers"], strict=True):
            c.load_state_dict(saved)
        self.index = parts["index"]
        return self
