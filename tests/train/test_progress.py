"""The moving line."""

import io
from typing import Any

import pytest
from rich.console import Console

from lorakit.train.progress import Progress


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
    monkeypatch.setattr("lorakit.train.progress.time.monotonic", lambda: now)
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
