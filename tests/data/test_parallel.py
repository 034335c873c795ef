"""The same bits whatever the number of processes; errors, a death and an interruption end all of them."""

import json
import os
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest

from lorakit.core.errors import DataError
from lorakit.data.parallel import in_processes
from lorakit.data.source import load_rows
from lorakit.data.tiny import tiny_tokenizer
from lorakit.data.tokenize import tokenize_rows
from lorakit.data.tokenized import How

pytestmark = pytest.mark.slow  # each starts processes that import torch
TOKENIZER = tiny_tokenizer()
ROWS = [{"text": f"the thing {i} " * (1 + i % 7)} for i in range(700)]


def answer(scale, task):
    if task == "die":
        os._exit(3)
    if task == "wrong":
        raise DataError("row 7 is wrong")
    if task == "bug":
        raise KeyError("a bug")
    time.sleep(0.001 * (task % 3))
    return scale * task


def test_results_come_in_order():
    tasks = iter(range(50))
    found = in_processes(partial(answer, 2), tasks, 2)
    assert next(found) == 0
    assert next(tasks) == 4  # no more than two ahead for each process
    assert list(found) == [2 * i for i in range(1, 50) if i != 4]


@pytest.mark.parametrize(("task", "error", "said"), [
    ("wrong", DataError, "^row 7 is wrong$"), ("bug", RuntimeError, "KeyError: 'a bug'"), ("die", DataError, "ended by itself .*memory"),
])  # fmt: skip
def test_an_error_ends_all_of_them(task, error, said):
    with pytest.raises(error, match=said):
        list(in_processes(partial(answer, 2), [1, 2, task, *range(100)], 2))
    assert not children()


def test_whoever_stops_listening_ends_all_of_them():
    results = in_processes(partial(answer, 1), range(10**9), 2)
    assert next(results) == 0
    assert len(children()) == 2
    results.close()
    assert not children()


@pytest.mark.parametrize(("n", "started"), [(0, 0), (1, 0), (2, 2), (9, 2)])
def test_no_more_processes_than_tasks_and_cores(monkeypatch, n, started):
    monkeypatch.setattr("lorakit.data.parallel.cores", lambda: 2)
    results = in_processes(partial(answer, 2), range(n), 16)
    assert next(results, 0) == 0
    assert len(children()) == started
    assert list(results) == [2 * i for i in range(1, n)]


def children():
    """Our worker processes that are still there."""
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False).stdout
    return [line for line in found.splitlines() if "parallel" in line]


def test_samples_do_not_depend_on_the_number_of_processes(tmp_path):
    """Of rows in memory, which are sent, and of a file's, which each process reads by itself."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    lazy = load_rows(str(tmp_path / "d.jsonl"), "valid", valid=str(tmp_path / "d.jsonl"), seed=0)
    alone = tokenize_rows(TOKENIZER, ROWS, max_length=16, how=How(workers=1))
    for rows in (ROWS, lazy):
        done = tokenize_rows(TOKENIZER, rows, max_length=16, how=How(workers=2))
        assert list(done.samples) == list(alone.samples)
        assert done.account == alone.account


def test_a_bad_row_is_named_as_it_is_in_one_process(tmp_path):
    chats = [{"messages": [{"role": "assistant", "content": "a"}]}] * 300 + [{"messages": [{"role": "user", "content": "a"}]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    lazy = load_rows(str(tmp_path / "d.jsonl"), "valid", valid=str(tmp_path / "d.jsonl"), seed=0)
    for rows, place in ((chats, "row 301"), (lazy, r".*d\.jsonl, line 301")):
        said = set()
        for workers in (1, 2):
            with pytest.raises(DataError, match=f"^{place}: the conversation has no assistant message") as caught:
                tokenize_rows(TOKENIZER, rows, max_length=16, how=How(workers=workers))
            said.add(str(caught.value))
        assert len(said) == 1


SCRIPT = """
import time
from lorakit.data.tiny import tiny_tokenizer
from lorakit.data.tokenize import tokenize_rows
from lorakit.data.tokenized import How
print("started", flush=True)
rows = [{{"text": "a b"}}] * {n}
done = tokenize_rows(tiny_tokenizer(), rows, max_length=16, how=How(workers=2))
print(len(done.samples), flush=True)
"""


def test_a_script_without_a_guard_does_not_start_itself_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(n=600))
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["started", "600"], done.stderr


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    """The script is interrupted while its processes work: it ends at once, and with it they."""
    (tmp_path / "script.py").write_text(
        "import signal, threading, os\nthreading.Timer(9, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n" + SCRIPT.format(n=10**7)
    )
    mark = f"lorakit-{os.getpid()}-{time.time_ns()}"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"MARK": mark},
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    time.sleep(0.5)
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and mark in environment(pid)]


def environment(pid):
    try:
        with open(f"/proc/{pid}/environ", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def test_a_tokenizer_of_the_main_script_is_used_in_one_process_unless_more_are_asked_for(tmp_path):
    script = textwrap.dedent("""
        from lorakit.core.errors import DataError
        from lorakit.data.parallel import in_processes
        class Own:
            def __call__(self, task): return task + 1
        print(list(in_processes(Own(), range(4), 2, required=False)))
        try:
            list(in_processes(Own(), range(4), 2))
        except DataError as error:
            print(error)
    """)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120, check=False)
    first, second = done.stdout.splitlines()
    assert first == "[1, 2, 3, 4]"
    assert "cannot be loaded in other processes" in second
    assert "use preprocessing_num_workers=1" in second
