"""A run's rows sent to TensorBoard and Weights & Biases as they are recorded, through Accelerate's trackers.

TensorBoard's files lie in `output_dir`/tensorboard, W&B's in `output_dir`/wandb (project: WANDB_PROJECT, else lorakit). A resumed run goes
on along the same axis: TensorBoard drops what a killed run wrote after its checkpoint, and W&B goes on with the same run.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from lorakit.core.errors import BadParameter, MissingExtra, one_line
from lorakit.train.config import TrainConfig
from lorakit.train.log import Row

EXTRA = "track"
PACKAGES = ("tensorboard", "wandb")


def wanted(report_to: str) -> tuple[str, ...]:
    """Names of the trackers that `report_to` asks for; "all" means those that are installed. Raises MissingExtra for one by name."""
    if report_to == "none":
        return ()
    installed = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is not None)
    if report_to != "all" and report_to not in installed:
        raise MissingExtra(report_to, EXTRA)
    return installed if report_to == "all" else (report_to,)


@dataclass
class Trackers:
    """The trackers of one run. Called with each row; one that fails is left out from there on, with a note, and the run goes on."""

    running: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(self, row: Row) -> None:
        """A row was recorded."""
        values = {_tag(k): v for k, v in row.items() if k not in ("step", "final") and v is not None}
        for name, tracker in list(self.running.items()):
            try:
                _SEND[name](tracker, values, row["step"])
            except Exception as error:  # a tracker's trouble (a full disk, a server) is not the run's
                self._drop(name, f"stopped at step {row['step']}", error)

    def close(self) -> None:
        """Finish all of them."""
        for name, tracker in list(self.running.items()):
            try:
                tracker.finish()
            except Exception as error:
                self._drop(name, "could not be closed", error)
        self.running.clear()

    def _drop(self, name: str, what: str, error: Exception) -> None:
        del self.running[name]
        self.notes.append(f"{name} {what}: {one_line(error)}")


def start(config: TrainConfig, settings: Mapping[str, Any], *, step: int) -> Trackers:
    """Start what `config.report_to` asks for. `settings`: what they show as hyperparameters; `step`: the last one that was done before.

    Raises MissingExtra, or BadParameter where a tracker cannot start (W&B without a login).
    """
    trackers = Trackers()
    for name in wanted(config.report_to):
        try:
            tracker = _START[name](config, step)
            tracker.start()
            trackers.running[name] = tracker
            tracker.store_init_configuration(_flat(settings))
            if name == "wandb":  # rows of a step come in several parts, and a resumed run repeats some
                tracker.tracker.define_metric("*", step_metric="step")
        except Exception as error:
            trackers.close()
            raise BadParameter(f"report_to: {name} cannot start: {one_line(error)}; use another tracker, or report_to=none") from None
    return trackers


def _tensorboard(config: TrainConfig, step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", config.output_dir, purge_step=step + 1)


def _wandb(config: TrainConfig, step: int) -> Any:
    from accelerate.tracking import WandBTracker

    out = Path(config.output_dir)
    again = {"id": _identity(out), "resume": "allow"}
    return WandBTracker(os.environ.get("WANDB_PROJECT", "lorakit"), name=config.run_name or out.resolve().name, dir=str(out), **again)


def _identity(out: Path) -> str:
    """The same for every start of one run, and no other run's."""
    file = out / "wandb" / "lorakit-run"
    if not (file.exists() and (out / "run.json").exists()):  # what is left of a run that is gone
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid4().hex[:16], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


_START = {"tensorboard": _tensorboard, "wandb": _wandb}
_SEND = {
    "tensorboard": lambda tracker, values, step: tracker.log(values, step=step),
    "wandb": lambda tracker, values, step: tracker.log(values | {"step": step}),
}


def _tag(key: str) -> str:
    """Held-out figures and training's in groups of their own, as trackers show them."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values that every tracker takes: numbers and strings as they are, all else as JSON."""
    return {k: v if isinstance(v, bool | int | float | str) else json.dumps(v, default=str) for k, v in settings.items() if v is not None}
