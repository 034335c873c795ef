"""`lorakit runs`: what is found, how it compares, and that no folder makes it fail."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import BadParameter
from lorakit.train.runs import compare, find, ordered, overlaid, read
from lorakit.train.train import train
from tests.cli.typed import run
from tests.train.runs import config
from tests.train.test_report import EVIL, checked


def write(folder: Path, *, result: Any = None, rows: Any = ((1, 3.0), (2, 2.0)), record: Any = None, **keys: Any) -> Path:
    """A run's folder, as training leaves one."""
    folder.mkdir(parents=True)
    keys = {"method": "lora", "model": "bundled", "train_data": "d.jsonl", "max_length": 64, "method_args": {"r": 4}} | keys
    facts = {"started": "2026-01-01 00:00 UTC", "held_out_hash": "h", "base": {"rows": "b"}, "trainable_params": 10} | (record or {})
    (folder / "run.json").write_text(json.dumps(facts | {"config": keys}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": x, "eval_loss": x + 1}) + "\n" for s, x in rows))
    if result is not None:
        (folder / "result.json").write_text(json.dumps({"steps": 2, "final": {"loss": result}, "trainable_params": 10, "seconds": 1.5}))
    return folder


def test_real_runs_are_listed_sorted_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = config(tmp_path, output_dir=str(tmp_path / "runs/one"), report_samples=0)
    train(one, quiet=True)
    train(one.model_copy(update={"output_dir": str(tmp_path / "runs/deep/two"), "learning_rate": 1e-4}), quiet=True)
    listed = run("runs", ".")
    assert all(word in listed for word in ("runs/one", "deep/two", "lora", "finished"))
    found = json.loads(run("runs", str(tmp_path), "--json", "--sort", "-loss"))
    assert [Path(one["folder"]).name for one in found] == ["two", "one"]
    assert found[0]["figures"]["loss"] > found[1]["figures"]["loss"] and found[0]["base"]["loss"] > 0
    said = run("runs", "--compare", str(tmp_path / "runs/one"), str(tmp_path / "runs/deep/two"), "--html", str(tmp_path / "page.html"))
    assert "learning_rate" in said and "max_length" not in said and "mind:" not in said
    page = (tmp_path / "page.html").read_text()
    words = " ".join(checked(page).words)
    assert "Held-out loss" in words and "learning_rate" in words and page.count('class="line c') >= 6


def test_curves_and_names_say_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, task in (("a", "dpo"), ("b", "causal-lm"), ("c", "nothing known")):
        folder = write(Path("runs", name), result=1.0, record={"task": task}, run_name="named" if name == "a" else None)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens_per_second": 3.0}) + "\n")
        (folder / "result.json").write_text(
            json.dumps({"steps": 2, "final": {"kl": 0.5, "loss": 1.0}, "trainable_params": 1, "seconds": 14.7})
        )
    assert [c.title for c in overlaid(find(["runs"]))] == ["Pairs, trained tokens, tokens a second"]
    assert [c.title for c in overlaid(find(["runs/b"]))] == ["Trained tokens a second"]
    run("runs", "runs/a", "runs/b", "--compare", "--html", "page.html")
    words = checked(Path("page.html").read_text()).words
    assert "KL" in words and "named" in words and "b" not in words, "a name that is the folder's stands once"
    assert ("seconds", [15, 15, 15]) in compare(find(["runs"])).figures


def test_states_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", result=1.0)
    write(tmp_path / "b")
    old = write(tmp_path / "c") / "metrics.jsonl"
    os.utime(old, (time.time() - 3600,) * 2)
    (write(tmp_path / "d") / "metrics.jsonl").unlink()
    assert [one.state for one in find([tmp_path])] == ["finished", "running at step 2", "stopped at step 2", "not started"]
    assert find([tmp_path])[2].figures == {"loss": 3.0}


def test_folders_inside_runs_and_links_are_not_searched(tmp_path: Path) -> None:
    write(tmp_path / "a", result=1.0)
    write(tmp_path / "a" / "checkpoint-2")
    write(tmp_path / ".hidden" / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [one.folder.name for one in find([tmp_path, tmp_path / "a"])] == ["a"]


def test_what_differs_and_what_does_not_compare(tmp_path: Path) -> None:
    one = write(tmp_path / "one", result=1.0)
    same = write(tmp_path / "same", result=1.5, method_args={"r": 8})
    other = write(tmp_path / "other", result=2.0, max_length=128, record={"held_out_hash": "x", "base": {"rows": "c"}})
    unknown = write(tmp_path / "unknown", record={"held_out_hash": None})
    found = compare([read(one), read(same)])
    assert found.differing == [("r", [4, 8])] and not found.warnings
    assert dict(found.figures)["loss"] == [1.0, 1.5]
    said = " | ".join(compare([read(one), read(other)]).warnings)
    assert "different held-out data: their figures are not comparable" in said
    assert "different bases" in said and "max_length differs" in said
    said = " | ".join(compare([read(one), read(unknown)]).warnings)
    assert "not known on which held-out data" in said and "not finished" in said
    with pytest.raises(BadParameter, match="there is one run to compare"):
        compare([read(one)])


def test_sorting_knows_columns_and_figures(tmp_path: Path) -> None:
    for name, loss in (("a", 2.0), ("b", 1.0), ("c", 3.0)):
        write(tmp_path / name, result=loss)
    (write(tmp_path / "d", rows=()) / "metrics.jsonl").unlink()
    found = find([tmp_path])
    assert [one.name for one in ordered(found, "loss")] == ["b", "a", "c", "d"]
    assert [one.name for one in ordered(found, "-loss")] == ["c", "a", "b", "d"]
    with pytest.raises(BadParameter, match="Did you mean 'loss'"):
        ordered(found, "los")


def damage(folder: Path) -> None:
    """Every way in which a run's folder can be broken."""
    text: dict[str, dict[str, str]] = {
        "half": {"run.json": '{"config": {'},
        "list": {"run.json": "[1, 2]"},
        "deep": {"run.json": "[" * 100_000},
        "no config": {"run.json": "{}"},
        "bad config": {"run.json": '{"config": [1], "started": {"x": 1}, "method": 5}'},
        "bad types": {"run.json": '{"config": {"model": 3, "train_data": {"a": 1}, "run_name": []}, "base": 7, "held_out_hash": []}',
                      "result.json": '{"steps": "six", "final": {"loss": "low", "x": NaN, "y": 1e999, "z": true}, "seconds": {}}'},
        "no final": {"run.json": '{"config": {}}', "result.json": '{"steps": 3, "final": 1}'},
        "bad rows": {"run.json": '{"config": {}}', "metrics.jsonl": '{"step": 1}\nnothing\n{"step": 2}\n'},
        "odd rows": {"run.json": '{"config": {}}', "metrics.jsonl": '[1]\n{"step": "x", "loss": []}\n{"step": 1e400, "loss": 1}\n'},
        "huge": {"run.json": '{"config": {"r": ' + "9" * 6000 + "}}"},
        "only results": {"result.json": '{"steps": 1, "final": {"loss": 1}}', "metrics.jsonl": ""},
    }  # fmt: skip
    for name, files in text.items():
        (folder / name).mkdir(parents=True)
        for file, content in files.items():
            (folder / name / file).write_text(content)
    (folder / "bytes").mkdir()
    (folder / "bytes" / "run.json").write_bytes(b"\xff\xfe\x00")
    (folder / "folder" / "run.json").mkdir(parents=True)
    for name, target in (("dangling", "nowhere"), ("loop", "run.json"), ("device", "/dev/zero")):
        (folder / name).mkdir()
        (folder / name / "run.json").symlink_to(target)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "run.json")


def test_damaged_folders_are_listed_as_damaged(tmp_path: Path) -> None:
    damage(tmp_path)
    write(tmp_path / "good", result=1.0)
    found = {one.folder.name: one for one in find([tmp_path])}
    assert len(found) == 18
    assert [name for name, one in found.items() if one.state != "damaged"] == ["good"]
    assert all(one.problem for name, one in found.items() if name != "good")
    listed = run("runs", str(tmp_path))
    assert listed.count("damaged: ") == 17 and "Traceback" not in listed
    assert len(json.loads(run("runs", str(tmp_path), "--json"))) == 18
    run("runs", "--compare", str(tmp_path), "--html", str(tmp_path / "page.html"))
    checked((tmp_path / "page.html").read_text())


def test_what_a_run_calls_itself_is_only_text(tmp_path: Path) -> None:
    write(tmp_path / "a", result=1.0, run_name=EVIL, model="[bold]x[/nothing]", method_args={EVIL: EVIL})
    write(tmp_path / "b", result=2.0, train_data=[EVIL])
    assert "[/nothing]" in run("runs", str(tmp_path))
    assert "\x00" not in run("runs", "--compare", str(tmp_path), "--html", str(tmp_path / "page.html"))
    checked((tmp_path / "page.html").read_text())


KEYS = st.text(max_size=8) | st.sampled_from(["config", "final", "steps", "loss", "eval_loss", "step", "base", "method_args", "started"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=60)
@given(record=JSON, result=JSON, rows=st.lists(JSON, max_size=4))
def test_no_json_makes_it_fail(record: Any, result: Any, rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any") / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [read(folder), write_once(folder.parent)]
    for by in ("started", "loss", "name"):
        ordered(found, by)
    json.dumps(compare(found).as_dict(), default=str)
    overlaid(found)


def write_once(folder: Path) -> Any:
    return read(write(folder / "good", result=1.0))


def test_nothing_there_is_said(tmp_path: Path) -> None:
    assert "no runs below" in run("runs", str(tmp_path))
    assert "is no folder" in run("runs", str(tmp_path / "none"), code=2)
    assert "there are no runs to compare" in run("runs", "--compare", str(tmp_path), code=2)
    write(tmp_path / "a", result=1.0)
    assert "cannot write --html" in run("runs", str(tmp_path), "--html", "/dev/null/page.html", code=2)
