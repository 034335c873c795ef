"""What a report says to type next is typed: it runs, and measures the rows that the run held out, read as the run read them."""

import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.typed import run
from tests.train.runs import model_folder

PAIRS = [{"frage": f"{i % 7} + {i}", "antwort": str(i % 7 + i)} for i in range(60)]
PREFERENCES = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(30)]
COLUMNS = "{prompt: frage, completion: antwort}"


def written(path: Path, rows: list[dict[str, Any]], before: str = "") -> str:
    path.write_text(before + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trained(tmp: Path, *words: str) -> tuple[list[list[str]], dict[str, float]]:
    """The `lorakit eval` commands of a short run's report, and what the run measured at its end."""
    base = ["train", "--model", model_folder(tmp / "model"), "--output-dir", str(tmp / "out"), "--max-steps", "2", "--quiet"]
    said = run(*base, "--per-device-train-batch-size", "4", "--report-samples", "0", *words)
    assert "…" not in said, "names and figures are whole"
    assert f"report: {tmp / 'out' / 'report.html'}" in said.splitlines()
    page = html.unescape(re.sub(r"<[^>]+>", "\n", (tmp / "out" / "report.html").read_text(encoding="utf-8")))
    typed = [shlex.split(line) for line in page.splitlines() if line.startswith("lorakit eval ")]
    return typed, json.loads((tmp / "out" / "result.json").read_text())["final"]


def measured(command: list[str], *more: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(run(*command[1:], "--json", *more))
    return found


def test_columns_fraction_and_bad_rows_are_remembered(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", PAIRS, before='{"frage": "\n')
    (command,), final = trained(tmp_path, "--train-data", rows, "--columns", COLUMNS, "--eval-fraction", "0.3", "--skip-bad")
    assert measured(command) == pytest.approx(final, abs=1e-5)
    assert measured(command, "--eval-fraction", "0.6") != pytest.approx(final, abs=1e-5)
    other = written(tmp_path / "other.jsonl", PAIRS)
    assert "no known set of keys" in run("eval", command[2], "--data", other, "--whole", code=2)  # another source is read by its own words
    measured(["lorakit", "eval", command[2], "--data", other, "--whole"], "--columns", COLUMNS)


def test_a_source_that_was_named_for_it_is_measured_whole(tmp_path: Path) -> None:
    train, held = written(tmp_path / "rows.jsonl", PAIRS), written(tmp_path / "held.jsonl", PAIRS[:9])
    (command,), final = trained(tmp_path, "--train-data", train, "--eval-data", held, "--columns", COLUMNS)
    assert measured(command) == pytest.approx(final, abs=1e-5)


def test_of_a_mixture_each_source_is_measured(tmp_path: Path) -> None:
    names = [written(tmp_path / f"{i}.jsonl", PAIRS[i::2]) for i in range(2)]
    commands, _ = trained(tmp_path, "--train-data", f"{{{names[0]}: 1, {names[1]}: 0.5}}", "--columns", COLUMNS)
    assert [command[4] for command in commands] == names
    assert all(measured(command)["loss"] > 0 for command in commands)


def test_preferences_learned_as_feedback_are_measured_as_feedback(tmp_path: Path) -> None:
    (command,), final = trained(tmp_path, "--train-data", written(tmp_path / "rows.jsonl", PREFERENCES), "--task", "kto")
    assert measured(command) == pytest.approx(final, abs=1e-5)
