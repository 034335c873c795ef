"""The line that moves while a run does."""

import time
from collections import deque
from typing import Self

from rich import progress
from rich.console import Console

from lorakit.train.memory import used_bytes

WINDOW = 50
"""Steps that the time left is judged by: long enough to be calm, short enough to follow a change."""

COUNTED = {
    "causal-lm": "trained tokens",
    "sequence-classification": "texts",
    "token-classification": "words",
    "dpo": "pairs",
    "kto": "answers",
}
"""Task -> what its loss is a mean over, which is what tokens_per_second counts."""


class Progress:
    """Steps done, loss, tokens a second, memory and time left: a bar on a terminal, else silent, or a plain line every `every` steps.

        with Progress(1000, start=200) as progress:
            progress.advance(loss=2.31, tokens_per_second=4096.0)

    Args:
        total: the run's last step.
        start: the step that the run starts or resumes after.
        every: without a terminal, print a line whenever the step is a multiple of this, and at the last step; None prints nothing.
        quiet: show nothing at all, as every process but the first does.
        console: where to write; None for standard error.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every: int | None = None,
        quiet: bool = False,
        counted: str = "tokens",
        console: Console | None = None,
    ) -> None:
        self.total, self.step, self.counted = total, start, "tok" if counted.endswith("tokens") else counted
        self.every = None if quiet else every
        self.console = console or Console(stderr=True)
        self._times = deque([time.monotonic()], maxlen=WINDOW)
        columns = (progress.BarColumn(24), progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[status]}"))
        self._bar = progress.Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self._task = self._bar.add_task("train", total=total, completed=start, status="")

    def advance(self, *, loss: float, tokens_per_second: float | None = None, memory: int | None = None) -> None:
        """One more step is done. `memory` in bytes; None for `used_bytes()`."""
        self.step += 1
        self._times.append(time.monotonic())
        parts = [f"loss {loss:.4f}"]
        parts += [] if tokens_per_second is None else [f"{tokens_per_second:,.0f} {self.counted}/s"]
        parts += [f"{(used_bytes() if memory is None else memory) / 1e9:.2f} GB", f"ETA {_clock(self.seconds_left())}"]
        self._show("  ".join(parts))

    def seconds_left(self) -> float:
        """Time to the last step at the pace of the last ones."""
        pace = (self._times[-1] - self._times[0]) / max(1, len(self._times) - 1)  # seconds a step
        return pace * (self.total - self.step)

    def _show(self, status: str) -> None:
        if not self._bar.disable:
            self._bar.update(self._task, completed=self.step, status=status)
        elif self.every and (self.step % self.every == 0 or self.step == self.total):
            self.console.print(f"step {self.step}/{self.total}  {status}", highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}"
