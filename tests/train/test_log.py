"""Rows that survive kills and resumes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.core.errors import BadParameter, DataError
from lorakit.train.log import MetricsLog, read_log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def filled(path: Path, steps: int = 5) -> None:
    with MetricsLog(path) as log:
        for step in range(1, steps + 1):
            log.append({"step": step, "loss": 1 / step})


def test_rows_are_json_lines_in_order_and_readable_while_open(path: Path) -> None:
    log = MetricsLog(path)
    log.append({"step": 1, "loss": 2.5, "note": "warm-up", "best": True, "eval_loss": None})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 2.5, "note": "warm-up", "best": True, "eval_loss": None}
    log.append({"step": 2, "loss": 2.25})
    assert log.rows() == read_log(path)
    assert [row["step"] for row in log.rows()] == [1, 2]
    log.close()


def test_scalars_are_unpacked_and_what_json_lacks_becomes_null(path: Path) -> None:
    with MetricsLog(path) as log:
        log.append(
            {"step": 1, "a": torch.tensor(1.5), "b": np.float32(0.5), "c": np.int64(7), "d": float("nan"), "e": torch.tensor(torch.inf)}
        )
    assert read_log(path) == [{"step": 1, "a": 1.5, "b": 0.5, "c": 7, "d": None, "e": None}]


@pytest.mark.parametrize("row", [{"loss": 1.0}, {"step": 1.0}, {"step": "1"}, {"step": 1, "x": [1, 2]}, {"step": 1, "x": torch.zeros(2)}])
def test_other_rows_are_refused_and_nothing_is_written(path: Path, row: dict[str, Any]) -> None:
    with MetricsLog(path) as log, pytest.raises(BadParameter):
        log.append(row)
    assert path.read_bytes() == b""


def test_reopening_appends(path: Path) -> None:
    filled(path, 2)
    with MetricsLog(path) as log:
        log.append({"step": 3})
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_a_torn_last_line_is_not_read_and_is_cut_off_on_opening(path: Path, cut: int) -> None:
    filled(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [row["step"] for row in read_log(path)] == [1, 2]
    with MetricsLog(path) as log:
        log.append({"step": 3, "loss": 1 / 3})
    assert path.read_bytes() == whole


def test_a_broken_line_before_the_last_is_an_error(path: Path) -> None:
    filled(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:7] + "\n" + lines[2])
    with pytest.raises(DataError, match="line 2"):
        read_log(path)


@pytest.mark.parametrize(("step", "left"), [(0, []), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (99, [1, 2, 3, 4, 5])])
def test_truncate_drops_the_rows_of_later_steps(path: Path, step: int, left: list[int]) -> None:
    filled(path)
    with MetricsLog(path) as log:
        log.truncate(step)
        assert [row["step"] for row in log.rows()] == left
        log.append({"step": step + 1, "loss": 9.0})
        assert [row["step"] for row in log.rows()] == [*left, step + 1]


def test_several_rows_of_the_resumed_step_stay(path: Path) -> None:
    with MetricsLog(path) as log:
        for row in ({"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.1}, {"step": 3, "loss": 0.9}):
            log.append(row)
        log.truncate(2)
        assert log.rows() == [{"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.1}]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_every_appended_row_survives_kill_9(path: Path) -> None:
    code = (
        "import os, signal, sys; from lorakit.train.log import MetricsLog; log = MetricsLog(sys.argv[1])\n"
        "for step in range(1, 1001): log.append({'step': step, 'text': 'x' * 50})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=False).returncode == -signal.SIGKILL
    assert [row["step"] for row in read_log(path)] == list(range(1, 1001))
