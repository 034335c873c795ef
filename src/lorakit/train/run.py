"""One training run: its events, and what survives a kill.

An ordinary step: before_forward · micro-batches (summed token losses, backward) · divide by the tokens of all processes · penalties ·
after_backward · clip · optimizer.step · after_step · zero_grad. Dividing once, after the last micro-batch, makes accumulation exact for
uneven token counts. A method's loop may do other things between before_forward and the end.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.attach import Adapted
from lorakit.core.calibrate import Calibration
from lorakit.core.errors import CheckpointError, Incompatible, LorakitError
from lorakit.core.events import MicroBatches, Scored, Step, Task
from lorakit.core.params import Param, ParamTable
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.train.checkpoint import write_checkpoint
from lorakit.train.compile import CompiledLayers
from lorakit.train.config import TrainConfig
from lorakit.train.dataset import TrainData
from lorakit.train.distributed import World
from lorakit.train.evaluate import ALONE, evaluate
from lorakit.train.kinds import told
from lorakit.train.log import MetricsLog
from lorakit.train.memory import used_bytes
from lorakit.train.metrics import forward_loss, forward_scored
from lorakit.train.preference import Ratios
from lorakit.train.progress import COUNTED, Progress
from lorakit.train.sequence import Figures, ends_of, rates_of, summary
from lorakit.train.state import random_state, restore_random, write_state
from lorakit.train.stream import Stream, calibration


@dataclass
class Position:
    """Where a run stands; everything here is in a checkpoint."""

    step: int = 0
    tokens: int = 0
    window_nats: float = 0.0
    window_tokens: int = 0
    window_sums: list[float] = field(default_factory=list)
    """What an aim tells of the window (train/preference.py)."""
    best_loss: float = math.inf
    best_step: int = -1
    stale: int = 0
    stopped: bool = False
    task: int = 0
    borders: list[list[Figures]] = field(default_factory=list)
    """Figures of every task seen, at each border between tasks so far (train/sequence.py)."""


class Run:
    """Trains the active adapter of `adapted`. `out` None: nothing is written."""

    def __init__(
        self,
        adapted: Adapted,
        data: TrainData,
        config: TrainConfig,
        world: World,
        *,
        out: Path | None,
        quiet: bool = False,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self.adapted, self.data, self.config, self.world, self.out = adapted, data, config, world, out
        (self.name,) = adapted.active
        method = adapted.methods[self.name]
        self.batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
        self.ends = ends_of(config, [len(task.train.items) for task in data.tasks], self.batch)
        self.total, self.schedule = self.ends[-1], rates_of(config, self.ends)
        self.at, self.streams = Position(), list[Stream]()
        self.method = method
        self._make_optimizer()
        self.controllers = [spec.build(self) for spec in method.controllers]
        self.loop = method.loop.build(self)
        self.history: list[dict[str, Any]] = []
        self.log = MetricsLog(out / "metrics.jsonl") if out and world.main else None
        self.listeners: list[Callable[[dict[str, Any]], None]] = []  # of the main process: told of each row as it is recorded
        self.quiet = quiet or not world.main
        self.compiled = compiled

    # --- the loop ---------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Run to the end and return the final evaluation."""
        try:
            return self._train()
        finally:
            if self.log:
                self.log.close()
            if self.compiled:
                self.compiled.undo()
                self.adapted.notes += self.compiled.notes

    def _train(self) -> dict[str, float]:
        model = self.adapted.model.train()
        if self.at.step == 0:
            if self.log:
                self.log.truncate(0)  # of a run that was killed before its first checkpoint
            for controller in self.controllers:
                controller.start()
            for controller in self.controllers:
                controller.before_task(self.task)
        with Progress(self.total, quiet=self.quiet, start=self.at.step, counted=COUNTED.get(self.data.task, "tokens")) as progress:
            while self.at.step < self.total and not self.at.stopped:
                row = self._step(progress)
                self._after(row)
        model.eval()
        if self.config.load_best_model_at_end and self.out and self.at.best_step >= 0:
            self._take_best()
        for controller in self.controllers:
            controller.after_task(self.task)
        for controller in self.controllers:
            controller.finish()
        final = self._judge_tasks() if self.data.later else self.evaluate()
        self._record({"step": self.at.step, **{f"eval_{k}": v for k, v in final.items()}, "final": True})
        self._check_finite("the held-out loss", final["loss"], "after the last step")
        return final

    def _check_finite(self, what: str, value: float, when: str) -> None:
        """LorakitError unless it is: what has diverged is not saved."""
        if not math.isfinite(value):
            raise LorakitError(f"{what} is {value} {when}; lower learning_rate ({self.config.learning_rate}) or check the data")

    def evaluate(self, task: TrainData | None = None) -> Figures:
        """Figures on the held-out side of a task, by default of the present one. A sharded base gathers its weights in every forward, so
        there all processes run all batches."""
        world, valid = ALONE if self.world.sharded else self.world, (task or self.shown).valid
        return evaluate(self.adapted.model, valid, batch_size=self.config.per_device_eval_batch_size, world=world, adapted=self.adapted)

    # --- tasks in sequence (train/sequence.py) ------------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """The present task."""
        return Task(self.at.task, len(self.ends))

    @property
    def shown(self) -> TrainData:
        """The present task's data."""
        return self.data.tasks[self.at.task]

    def _cross_border(self) -> None:
        """Close a task, see what became of those before it, and begin the next."""
        for controller in self.controllers:
            controller.after_task(self.task)
        figures = self._judge_tasks()
        self._record({"step": self.at.step, "task": self.at.task, **{f"eval_{k}": v for k, v in figures.items()}})
        self.at.task += 1
        self._make_optimizer()
        for stream in self.streams:
            stream.turn(self.shown.train)
        for controller in self.controllers:
            controller.before_task(self.task)

    def _judge_tasks(self) -> Figures:
        """Evaluate every task seen so far, and sum up."""
        self.at.borders.append([self.evaluate(task) for task in self.data.tasks[: self.at.task + 1]])
        return summary(self.at.borders)

    def _step(self, progress: Progress) -> dict[str, Any]:
        index, began = self.at.step, time.perf_counter()
        info = Step(index, self.total)
        self.figures: dict[str, float] = {}
        for controller in self.controllers:
            controller.before_forward(info)
        rate = self.schedule(index) * math.prod(controller.rate(info) for controller in self.controllers)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        nats, tokens = self.loop.step(info)
        if self.compiled:
            self.compiled.stepped()
        at = self.at
        at.step, at.tokens = index + 1, at.tokens + tokens
        at.window_nats, at.window_tokens = at.window_nats + nats, at.window_tokens + tokens
        speed = tokens / (time.perf_counter() - began)
        progress.advance(loss=nats / max(1, tokens), tokens_per_second=speed, memory=used_bytes())
        return {"step": at.step, **self.figures, "tokens_per_second": round(speed, 1), "memory": used_bytes()}

    # --- what controllers and loops ask for (core/events.py) -----------------------------------------------------------------

    def stream(self, lo: float = 0.0, hi: float = 1.0) -> Stream:
        """The training data from the share [lo, hi) of a fixed shuffle, endlessly."""
        self.streams.append(Stream(self.shown.train, self.config, self.world, lo, hi))
        return self.streams[-1]

    def gradients(self, batches: MicroBatches, info: Step) -> tuple[float, int]:
        """Add the mean-loss gradients over all processes, and the penalties'; (summed nats, tokens)."""
        table = self.table
        before = [row.tensor.grad for row in table]
        for row in table:
            row.tensor.grad = None
        nats, tokens, sums = torch.zeros((), dtype=torch.float64), 0, self._no_sums()
        for i, batch in enumerate(batches):
            loss, shown, n = self._forward(batch, info, i, sums)
            if loss.requires_grad:  # a method may leave out the whole backward pass of a step
                loss.backward()
            nats, tokens = nats + shown.double().cpu(), tokens + n
        if info.index == 0:
            check_reached(table)
        grads = _grads(table)
        self.world.sum_(grads)
        total_nats, total_tokens, *totals = self.world.total(float(nats), tokens, *sums.tolist())
        self._count(totals)
        self._check_finite("the loss", total_nats, f"at step {info.index}")
        if grads:
            torch._foreach_mul_(grads, 1 / max(1.0, total_tokens))
        for penalty in self.method.penalties:
            penalty(self.adapted, self.adapted.context).backward()
        for row, earlier in zip(table, before, strict=True):
            if earlier is not None:
                row.tensor.grad = earlier if row.tensor.grad is None else earlier.add_(row.tensor.grad)
        return total_nats, int(total_tokens)

    def _forward(self, batch: Mapping[str, Any], info: Step, i: int, sums: Tensor) -> tuple[Tensor, Tensor, int]:
        """(training loss, plain loss, tokens) of the i-th micro-batch, the losses summed over its targets. What an aim has to tell is added
        to `sums`."""
        number = (info.index * self.config.gradient_accumulation_steps + i) * self.world.size + self.world.rank
        if (aim := self.shown.train.aim) is not None:
            within = partial(self.adapted.given, step=number, seed=self.config.seed)
            ratios = Ratios(self.adapted.model, self.adapted, within, self.world, compiled=self.compiled is not None)
            judged = aim(ratios, batch)
            sums += judged.sums
            return judged.loss, judged.sums[0], judged.n
        done: list[Scored] = []

        def score(k: int) -> Scored:
            with self.adapted.given(step=number, seed=self.config.seed + (k << 32)):
                done.append(forward_scored(self.adapted.model, inputs))
            return done[-1]

        with told(self.adapted.model, batch) as inputs:
            if self.method.objective is None:  # nobody wants the logits
                with self.adapted.given(step=number, seed=self.config.seed):
                    loss, n = forward_loss(self.adapted.model, inputs)
                return loss, loss.detach(), n
            loss, n = self.method.objective(score, self.adapted)
        return loss, done[0].loss.detach(), n

    @torch.no_grad()
    def loss(self, batches: MicroBatches, info: Step) -> tuple[float, int]:
        """(summed nats, tokens) over all processes, without a graph."""
        nats, tokens, sums = 0.0, 0.0, self._no_sums()
        for i, batch in enumerate(batches):
            _, shown, n = self._forward(batch, info, i, sums)
            nats, tokens = nats + shown.item(), tokens + n
        nats, tokens, *totals = self.world.total(nats, tokens, *sums.tolist())
        self._count(totals)
        return nats, int(tokens)

    def _no_sums(self) -> Tensor:
        aim = self.shown.train.aim
        return torch.zeros(0 if aim is None else aim.width, dtype=torch.float64)

    def _count(self, sums: list[float]) -> None:
        self.at.window_sums = [a + b for a, b in zip(self.at.window_sums or [0.0] * len(sums), sums, strict=True)]

    def update(self, info: Step) -> None:
        """after_backward, clip, one step of the optimizer at this step's rate, after_step, zero_grad."""
        for controller in self.controllers:
            controller.after_backward(info)
        norm, clip = self._clip()
        self._check_finite("the gradient's norm", norm, f"at step {info.index}")
        self.optimizer.step()
        for controller in self.controllers:
            controller.after_step(Step(info.index, info.total, clip))
        self.optimizer.zero_grad(set_to_none=True)
        self.figures = {"learning_rate": self.optimizer.param_groups[0]["lr"], "grad_norm": norm}

    def scored(self, batch: Mapping[str, Any]) -> Scored:
        """One plain forward of a batch, with its graph."""
        return forward_scored(self.adapted.model, batch)

    @property
    def processes(self) -> int:
        """How many processes the run has."""
        return self.world.size

    def total_(self, tensor: Tensor) -> None:
        """Sum a statistic over all processes, in place."""
        self.world.total_(tensor)

    def calibration(self, batches: int) -> Calibration:
        """So many batches from the start of the present task's training data (0: all of it), shared among the processes."""
        return calibration(self.shown.train, self.config, self.world, batches)

    @property
    def epoch(self) -> float:
        """Passes over the training items so far, of the first stream."""
        return self.streams[0].sampler.epoch if self.streams else 0.0

    @property
    def table(self) -> ParamTable:
        """The trained parameters as they are now."""
        return self.adapted.params()

    def _make_optimizer(self) -> None:
        spec = self.method.optim or AdamW()
        self.optimizer = spec.build(self.table, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def _clip(self) -> tuple[float, float]:
        grads = _grads(self.table)
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
            aim = self.shown.train.aim
            told_more = {} if aim is None else aim.figures(at.window_sums)
            self._record(row | {"loss": loss, **told_more, "epoch": round(self.epoch, 4), "tokens": at.tokens})
            at.window_nats, at.window_tokens, at.window_sums = 0.0, 0, []
        if config.eval_steps and at.step % config.eval_steps == 0 and at.step not in self.ends:
            self._judge()
        if at.step in self.ends[:-1]:  # before the checkpoint, which a resumed run then takes up in the next task
            self._cross_border()
        if self.out and config.save_steps and (at.step % config.save_steps == 0 or last or at.stopped):
            self.save_checkpoint()

    def _judge(self) -> None:
        figures, at = self.evaluate(), self.at
        where = {"task": at.task} if self.data.later else {}
        self._record({"step": at.step, **where, **{f"eval_{k}": v for k, v in figures.items()}})
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
            best = load_adapter(self.out / "best").tensors
            self.adapted.fit(self.name, best)  # ranks and legs may have been fewer then
            self.adapted.load_tensors(self.name, best)

    def _record(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        if self.log:
            self.log.append(row)
        for listener in self.listeners:
            listener(row)

    # --- checkpoints ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "position": vars(self.at),
            "adapter": self.adapted.tensors(self.name),
            "optimizer": self.optimizer.state_dict(),
            "controllers": [c.state_dict() for c in self.controllers],
            "loop": self.loop.state_dict(),
            "streams": [s.sampler.state_dict() for s in self.streams],
            "random": random_state(),
            "compiled": self.compiled is not None and self.compiled.failed is None,
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
        self.at = Position(**state["position"])
        for stream in self.streams:
            stream.turn(self.shown.train)
        self.adapted.fit(self.name, state["adapter"])
        self.adapted.load_tensors(self.name, state["adapter"])
        self._make_optimizer()  # for the tensors' present shapes
        self.optimizer.load_state_dict(state["optimizer"])
        for controller, saved in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state_dict(saved)
        self.loop.load_state_dict(state["loop"])
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.sampler.load_state_dict(saved)
        restore_random(state["random"])
        if self.log:
            self.log.truncate(self.at.step)


def _grads(table: ParamTable) -> list[Tensor]:
    return [row.tensor.grad for row in table if row.tensor.grad is not None]


def check_reached(rows: Iterable[Param]) -> None:
    """Raise Incompatible where a parameter got no gradient: some modules read a neighbor's weight and never run, and a foreign loss may go
    around others; adapting them would be in vain."""
    silent = [row.name for row in rows if row.tensor.grad is None]
    if silent:
        raise Incompatible(
            f"{len(silent)} parameters got no gradient in the first step ({silent[0]}, …): their modules never ran, or the loss goes round "
            "them; leave them out of sites (or of unfreeze)"
        )


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    out: Path
    steps: int
    final: dict[str, float]
    trainable: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    tasks: list[list[Figures]] = field(default_factory=list)
    """Of tasks in sequence: task i's figures after task t, [t][i]."""
    method: str = ""
    """That which was trained: init_adapter's own, where there was one."""
    base: dict[str, float] = field(default_factory=dict)
    """`final` of the base alone, where it was measured on all of the same data."""

    def write(self) -> None:
        """result.json, whose presence says that the run is complete."""
        facts = {"steps": self.steps, "final": self.final, "trainable_params": self.trainable, "seconds": self.seconds, "notes": self.notes}
        text = json.dumps(facts | {"method": self.method, "base": self.base} | ({"tasks": self.tasks} if self.tasks else {}), indent=1)
        partial = self.out / "result.json.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.out / "result.json")
