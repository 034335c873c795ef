"""TensorBoard and W&B see every row of a run, once, along one axis; what they cannot do costs no run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorakit.train.trackers as trackers
from lorakit.core.errors import BadParameter, MissingExtra
from lorakit.train.log import read_log
from lorakit.train.trackers import Trackers, wanted
from lorakit.train.train import train
from tests.train.runs import config, stopped


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads from a run's folder."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"), purge_orphaned_data=True)
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def logged(out: Path, key: str) -> list[tuple[int, float]]:
    return [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in read_log(out / "metrics.jsonl") if key in row]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_every_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(config(tmp_path, report_to="tensorboard", eval_steps=3, run_name="a/b"), quiet=True)
    out = tmp_path / "out"
    found = scalars(out)
    assert found["train/loss"] == logged(out, "loss") and len(found["train/loss"]) == 3
    assert found["eval/loss"] == logged(out, "eval_loss") and len(found["eval/loss"]) == 2
    assert found["train/learning_rate"] == logged(out, "learning_rate")
    settings = "".join(path.read_text() for path in (out / "tensorboard").rglob("hparams.yml"))
    assert "learning_rate: 0.01" in settings and "method: lora" in settings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_goes_on_along_the_same_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    settings = config(tmp_path, report_to="tensorboard", logging_steps=1, resume="auto")
    stopped(settings, 5, monkeypatch)
    assert [step for step, _ in scalars(tmp_path / "out")["train/loss"]] == [1, 2, 3, 4, 5]
    train(settings, quiet=True)
    found = scalars(tmp_path / "out")["train/loss"]
    assert found == logged(tmp_path / "out", "loss") and [step for step, _ in found] == [1, 2, 3, 4, 5, 6]


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is padding
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_has_every_row_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(config(tmp_path, report_to="wandb", eval_steps=3, run_name="mine"), quiet=True)
    (path,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    rows, runs = list[dict[str, Any]](), list[Any]()
    for data in records(path):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif record.WhichOneof("record_type") == "run":
            runs.append(record.run)
    assert (runs[0].display_name, runs[0].project) == ("mine", "lorakit")
    assert runs[0].run_id == (tmp_path / "out" / "wandb" / "lorakit-run").read_text()
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == logged(tmp_path / "out", "loss")
    assert [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row] == logged(tmp_path / "out", "eval_loss")


def test_a_tracker_that_is_missing_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name in trackers.PACKAGES else real(name))
    assert wanted("none") == () and wanted("all") == ()
    with pytest.raises(MissingExtra, match=r"wandb is not installed.*lorakit\[track\]"):
        train(config(tmp_path, report_to="wandb", model=str(tmp_path / "nowhere")), quiet=True)


class Fake:
    """A tracker that writes down what happens to it, and fails when it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.said = fails, list[Any]()
        self.tracker = self

    def _do(self, what: str, *more: Any) -> None:
        self.said.append((what, *more))
        if self.fails == what:
            raise OSError("the disk\nis full")

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("config", values)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._do("log", step, values)

    def finish(self) -> None:
        self._do("finish")


def test_trackers_are_closed_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(trackers._START, "tensorboard", lambda *args: fake)
    stopped(config(tmp_path, report_to="tensorboard"), 3, monkeypatch)
    assert [what for what, *_ in fake.said] == ["start", "config", "log", "finish"]
    assert fake.said[1][1]["max_steps"] == 6 and fake.said[2][1] == 2


def test_a_tracker_that_fails_is_left_out_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("log")
    monkeypatch.setitem(trackers._START, "tensorboard", lambda *args: fake)
    result = train(config(tmp_path, report_to="tensorboard"), quiet=True)
    assert [what for what, *_ in fake.said] == ["start", "config", "log"]
    assert "tensorboard stopped at step 2: the disk is full" in result.notes
    closing = Fake("finish")
    held = Trackers({"tensorboard": closing})
    held.close()
    assert held.notes == ["tensorboard could not be closed: the disk is full"] and not held.running


@pytest.mark.parametrize("fails", ["start", "config"])
def test_a_tracker_that_cannot_start_is_one_line(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers._START, "tensorboard", lambda *args: Fake(fails))
    with pytest.raises(BadParameter, match="tensorboard cannot start: the disk is full; use another tracker"):
        train(config(tmp_path, report_to="tensorboard"), quiet=True)
    assert not (tmp_path / "out" / "run.json").exists(), "the folder is still free"
