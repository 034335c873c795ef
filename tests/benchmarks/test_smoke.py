"""Every benchmark runs from end to end in a tiny size, so that none of them rots; what it writes is a page of the documentation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import results

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NAMES = re.findall(r"^BENCHMARKS = (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    out = tmp_path / f"{name}.json"
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {"benchmark", "machine", "versions", "args", "rows", "targets", "tables"} == set(found)
    assert found["benchmark"] == name
    assert found["rows"], "a benchmark without rows"
    columns = {column for shown in found["tables"].values() for column in shown}
    assert columns & set(results.columns_of(found["rows"])), "its tables print none of its columns"
    page = results.page(tmp_path)
    assert all(target["name"] in page for target in found["targets"])


def test_make_runs_all_that_know_how():
    """A benchmark with the shared flags is in the Makefile's list, or says in its first lines that it needs a GPU."""
    known = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "harness"}
    shared = {name for name, text in known.items() if "harness.arguments(" in text and "GPU" not in text.split("\n\n")[0]}
    assert set(NAMES) == shared
