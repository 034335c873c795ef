"""One training run: the loop, its events, and what survives a kill.

A step: before_forward · micro-batches (summed token losses, backward) · divide by the tokens of all processes · penalties ·
after_backward · clip · optimizer.step · after_step · zero_grad. Dividing once, after the last micro-batch, makes accumulation exact for
uneven token counts.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from lorakit.core.attach import Adapted
from lorakit.core.errors import CheckpointError, Incompatible, LorakitError
from lorakit.core.events import Step
from lorakit.data.sampler import Batches
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.train.checkpoint import write_checkpoint
from lorakit.train.config import TrainConfig
from lorakit.train.dataset import TrainData
from lorakit.train.distributed import World
from lorakit.train.evaluate import ALONE, evaluate, to
from lorakit.train.memory import used_bytes
from lorakit.train.metrics import forward_loss
from lorakit.train.report import MetricsLog, Progress
from lorakit.train.state import random_state, restore_random, write_state


@dataclass
class Position:
    """Where a run stands; everything here is in a checkpoint."""

    step: int = 0
    tokens: int = 0
    window_nats: float = 0.0
    window_tokens: int = 0
    best_loss: float = math.inf
    best_step: int = -1
    stale: int = 0
    stopped: bool = False


class Run:
    """Trains the active adapter of `adapted`. `out` None: nothing is written."""

    def __init__(
        self, adapted: Adapted, data: TrainData, config: TrainConfig, world: World, *, out: Path | None, quiet: bool = False
    ) -> None:
        self.adapted, self.data, self.config, self.world, self.out = adapted, data, config, world, out
        (self.name,) = adapted.active
        method = adapted.methods[self.name]
        self.batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        per_epoch = len(data.train.items) / self.batch
        self.total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
        self.table = adapted.params()
        self.optimizer = (method.optim or AdamW()).build(self.table, lr=config.learning_rate, weight_decay=config.weight_decay)
        warmup = config.warmup_steps or math.ceil(config.warmup_ratio * self.total)
        self.schedule = get_scheduler(config.lr_scheduler_type, self.optimizer, num_warmup_steps=warmup, num_training_steps=self.total)
        self.controllers = [spec.build(adapted, self.total) for spec in method.controllers]
        self.penalties = method.penalties
        self.sampler = Batches(len(data.train.items), self.batch, seed=config.seed, rank=world.rank, world=world.size)
        self.at = Position()
        self.history: list[dict[str, Any]] = []
        self.log = MetricsLog(out / "metrics.jsonl") if out and world.main else None
        self.quiet = quiet or not world.main

    # --- the loop ---------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the end and return the final evaluation."""
        try:
            return self._train()
        finally:
            if self.log:
                self.log.close()

    def _train(self) -> dict[str, float]:
        model = self.adapted.model.train()
        if self.at.step == 0:
            if self.log:
                self.log.truncate(0)  # of a run that was killed before its first checkpoint
            for controller in self.controllers:
                controller.start()
        with Progress(self.total, quiet=self.quiet, start=self.at.step) as progress:
            while self.at.step < self.total and not self.at.stopped:
                row = self._step(progress)
                self._after(row)
        model.eval()
        if self.config.load_best_model_at_end and self.out and self.at.best_step >= 0:
            self._take_best()
        for controller in self.controllers:
            controller.finish()
        final = self.evaluate()
        self._record({"step": self.at.step, **{f"eval_{k}": v for k, v in final.items()}, "final": True})
        return final

    def evaluate(self) -> dict[str, float]:
        """Figures on the held-out side. A sharded base gathers its weights in every forward, so there all processes run all batches."""
        world = ALONE if self.world.sharded else self.world
        return evaluate(self.adapted.model, self.data.valid, batch_size=self.config.per_device_eval_batch_size, world=world)

    def _step(self, progress: Progress) -> dict[str, Any]:
        index, began = self.at.step, time.perf_counter()
        info = Step(index, self.total)
        for controller in self.controllers:
            controller.before_forward(info)
        nats, tokens = self._gradients(index)
        for controller in self.controllers:
            controller.after_backward(info)
        norm, clip = self._clip()
        lr = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        for controller in self.controllers:
            controller.after_step(Step(index, self.total, clip))
        self.optimizer.zero_grad(set_to_none=True)
        at = self.at
        at.step, at.tokens = index + 1, at.tokens + tokens
        at.window_nats, at.window_tokens = at.window_nats + nats, at.window_tokens + tokens
        speed = tokens / (time.perf_counter() - began)
        progress.advance(loss=nats / max(1, tokens), tokens_per_second=speed, memory=used_bytes())
        return {"step": at.step, "learning_rate": lr, "grad_norm": norm, "tokens_per_second": round(speed, 1), "memory": used_bytes()}

    def _gradients(self, index: int) -> tuple[float, int]:
        """Mean-loss gradients of one step over all processes, penalties added; returns (summed nats, tokens)."""
        items = next(self.sampler)
        size = self.config.per_device_train_batch_size
        nats, tokens = torch.zeros((), dtype=torch.float64), 0
        for i in range(self.config.gradient_accumulation_steps):
            micro = [self.data.train.items[k] for k in items[i * size : (i + 1) * size]]
            batch = to(self.data.train.collate(micro), self.world.device)
            number = (index * self.config.gradient_accumulation_steps + i) * self.world.size + self.world.rank
            with self.adapted.given(step=number, seed=self.config.seed):
                loss, n = forward_loss(self.adapted.model, batch)
                loss.backward()
            nats, tokens = nats + loss.detach().double().cpu(), tokens + n
        if index == 0:
            self._check_reached()
        grads = self._grads()
        self.world.sum_(grads)
        total_nats, total_tokens = self.world.total(float(nats), tokens)
        if not math.isfinite(total_nats):
            raise LorakitError(
                f"the loss is {total_nats} at step {index}; lower learning_rate ({self.config.learning_rate}) or check the data"
            )
        torch._foreach_mul_(grads, 1 / max(1.0, total_tokens))
        for penalty in self.penalties:
            penalty(self.adapted, self.adapted.context).backward()
        return total_nats, int(total_tokens)

    def _grads(self) -> list[Tensor]:
        return [row.tensor.grad for row in self.table if row.tensor.grad is not None]

    def _check_reached(self) -> None:
        """Some modules read a neighbor's weight and never run; adapting them would be in vain."""
        silent = [row.name for row in self.table if row.tensor.grad is None]
        if silent:
            raise Incompatible(
                f"{len(silent)} parameters got no gradient in the first step ({silent[0]}, …): "
                "their modules never ran; leave them out of sites"
            )

    def _clip(self) -> tuple[float, float]:
        grads = self._grads()
        norm = float(torch.nn.utils.get_total_norm(grads))
        limit = self.config.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        if clip < 1.0:
            torch._foreach_mul_(grads, clip)
        return norm, clip

    # --- what happens between steps ---------------------------------------------------------------------------------------

    def _after(self, row: dict[str, Any]) -> None:
        at, config = self.at, self.config
        last = at.step >= self.total
        if at.step % config.logging_steps == 0 or last:
            loss = at.window_nats / max(1, at.window_tokens)
            self._record(row | {"loss": loss, "epoch": round(self.sampler.epoch, 4), "tokens": at.tokens})
            at.window_nats, at.window_tokens = 0.0, 0
        if config.eval_steps and at.step % config.eval_steps == 0 and not last:
            self._judge()
        if self.out and config.save_steps and (at.step % config.save_steps == 0 or last or at.stopped):
            self.save_checkpoint()

    def _judge(self) -> None:
        figures, at = self.evaluate(), self.at
        self._record({"step": at.step, **{f"eval_{k}": v for k, v in figures.items()}})
        if figures["loss"] < at.best_loss:
            at.best_loss, at.best_step, at.stale = figures["loss"], at.step, 0
            if self.out and self.world.main and self.config.load_best_model_at_end:
                self.adapted.save(self.out / "best", self.name)
        else:
            at.stale += 1
            at.stopped = at.stale >= (self.config.early_stopping_patience or math.inf)

    def _take_best(self) -> None:
        from lorakit.adapters.io import load_adapter

        assert self.out is not None
        final = self.evaluate()
        if final["loss"] >= self.at.best_loss:
            self.world.wait()
            self.adapted.load_tensors(self.name, load_adapter(self.out / "best").tensors)

    def _record(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        if self.log:
            self.log.append(row)

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "position": vars(self.at),
            "adapter": self.adapted.tensors(self.name),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "controllers": [c.state_dict() for c in self.controllers],
            "sampler": self.sampler.state_dict(),
            "random": random_state(),
        }

    def save_checkpoint(self) -> None:
        """Write a checkpoint, atomically."""
        assert self.out is not None
        if self.world.main:
            if self.log:
                self.log.sync()
            state = self.state()
            write_checkpoint(self.out, self.at.step, lambda folder: write_state(folder, state), keep=self.config.save_total_limit)
        self.world.wait()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises CheckpointError when it belongs to another adapter."""
        mine = self.adapted.tensors(self.name)
        if set(mine) != set(state["adapter"]):
            raise CheckpointError("the checkpoint holds another adapter's tensors; resume with the same method and sites")
        self.adapted.load_tensors(self.name, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for controller, saved in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state_dict(saved)
        self.sampler.load_state_dict(state["sampler"])
        self.at = Position(**state["position"])
        restore_random(state["random"])
        if self.log:
            self.log.truncate(self.at.step)


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    out: Path
    steps: int
    final: dict[str, float]
    trainable: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def write(self) -> None:
        """result.json, whose presence says that the run is complete."""
        text = json.dumps(
            {"steps": self.steps, "final": self.final, "trainable_params": self.trainable, "seconds": self.seconds, "notes": self.notes},
            indent=1,
        )
        partial = self.out / "result.json.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.out / "result.json")
