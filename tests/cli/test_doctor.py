"""`lorakit doctor`, as typed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.typed import run


def test_facts_and_problems() -> None:
    output = run("doctor", "--model", "bundled")
    assert "what a run uses" in output and "torch" in output and "BROKEN" not in output and output.endswith("nothing is broken\n")
    assert "lorakit export --to gguf" in output and "--to <str>" in run("export", "--help"), "flags that it names are there"
    found = json.loads(run("doctor", "--json"))
    assert found["facts"]["versions"]["lorakit"] and isinstance(found["problems"], list)


def test_something_broken_is_exit_code_1(tmp_path: Path) -> None:
    output = run("doctor", "--model", str(tmp_path), code=1)
    assert "BROKEN: cannot read" in output and output.endswith("1 of these must be mended before anything runs\n")


@pytest.mark.slow
def test_it_is_fast_and_imports_no_transformers() -> None:
    code = "import sys; from lorakit.train.doctor import examine; examine('bundled'); print('transformers' in sys.modules)"
    began = time.process_time(), time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
    assert time.perf_counter() - began[1] < 15, "seconds alone on a machine; tests share theirs"
