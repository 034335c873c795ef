"""Rows that survive kills and resumes, the drawn curve, the moving line."""

import io
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
from rich.console import Console

from lorakit.core.errors import BadParameter, DataError, MissingExtra
from lorakit.train.report import MetricsLog, Progress, draw_curve, read_log


# ----------------------------------------------------------------------------------------------------------------- the rows
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
        "import os, signal, sys; from lorakit.train.report import MetricsLog; log = MetricsLog(sys.argv[1])\n"
        "for step in range(1, 1001): log.append({'step': step, 'text': 'x' * 50})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=False).returncode == -signal.SIGKILL
    assert [row["step"] for row in read_log(path)] == list(range(1, 1001))


# ---------------------------------------------------------------------------------------------------------------- the curve
ROWS = [
    {"step": 1, "loss": 3.0, "learning_rate": 0.0},
    {"step": 2, "loss": 2.0, "learning_rate": 1e-3},
    {"step": 2, "eval_loss": 2.2},
    {"step": 3, "loss": None, "learning_rate": 5e-4},
]


def test_the_curve_is_a_png_and_pyplot_stays_out_of_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sys.modules.pop("matplotlib.pyplot", None)
    png = draw_curve(ROWS, tmp_path / "new" / "curve.png")
    first = png.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert draw_curve(iter(ROWS), png).read_bytes() == first
    assert "matplotlib.pyplot" not in sys.modules
    assert [p.name for p in png.parent.iterdir()] == ["curve.png"]


def test_rows_without_any_loss_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="nothing to draw"):
        draw_curve([{"step": 1, "learning_rate": 0.1}], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lorakit\[plot\]'"):
        draw_curve(ROWS, tmp_path / "curve.png")


# ------------------------------------------------------------------------------------------------------- the line that moves
def run(*, terminal: bool = False, **kwargs: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60)
    with Progress(10, start=4, console=console, **kwargs) as progress:
        for _ in range(6):
            progress.advance(loss=2.5, tokens_per_second=1234.4, memory=3 * 10**9)
    return out.getvalue()


def test_without_a_terminal_it_is_silent() -> None:
    assert run() == ""


def test_when_asked_it_prints_a_plain_line_every_n_steps_and_the_last() -> None:
    lines = run(every=4).splitlines()
    assert lines == [f"step {n}/10  loss 2.5000  1,234 tok/s  3.00 GB  ETA 0:00:00" for n in (8, 10)]


def test_on_a_terminal_it_is_a_bar() -> None:
    text = run(terminal=True, every=4)
    assert "10/10" in text
    assert "loss 2.5000" in text
    assert "step 8/10" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_nothing(terminal: bool) -> None:
    assert run(terminal=terminal, every=1, quiet=True) == ""


def test_time_left_follows_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lorakit.train.report.time.monotonic", lambda: now)
    out = io.StringIO()
    progress = Progress(2000, every=1, console=Console(file=out))
    for _ in range(100):
        now += 60.0
        progress.advance(loss=1.0)
    for _ in range(100):
        now += 2.0
        progress.advance(loss=1.0)
    assert progress.seconds_left() == 1800 * 2.0
    assert out.getvalue().splitlines()[-1].endswith("ETA 1:00:00")
    assert " GB" in out.getvalue()
