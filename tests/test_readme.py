"""README and runs/ are executed: a comment before a fenced block marks it.

    <!-- test -->                                     the block runs as it stands
    <!-- test slow -->                                so, marked slow (more than 20 seconds)
    <!-- test: lorakit train += --max-steps 2 -->     a tiny size: flags for every line that begins with the command (more after ";")

All blocks of a page run in one temporary folder, in the page's order.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lorakit.core.method import list_methods

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- test(?P<slow> slow)?(?:: (?P<sizes>[^>]+?))? -->\n```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)


class Block(NamedTuple):
    """One marked block, already in its tiny size."""

    language: str
    code: str
    slow: bool


def blocks(text):
    """The marked blocks of a page."""
    found = []
    for m in BLOCK.finditer(text):
        code = m["code"]
        for size in m["sizes"].split(";") if m["sizes"] else ():
            command, flags = (part.strip() for part in size.split("+="))
            code, hits = re.subn(rf"^({re.escape(command)}\b[^#\n]*)", rf"\1 {flags} ", code, flags=re.MULTILINE)
            assert hits, f"no line begins with {command!r}"
        found.append(Block(m["language"], code, bool(m["slow"])))
    return found


def cases():
    """pytest parameters, named after the first line."""
    return [pytest.param(b, id=b.code.split("\n")[0][:40], marks=[pytest.mark.slow] if b.slow else []) for b in blocks(README)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all blocks: a later one may use what an earlier one made."""
    return tmp_path_factory.mktemp("readme")


def execute(*command, cwd):
    """Run with this interpreter's commands first on the path and without a network."""
    env = os.environ | {"TINY": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("block", cases())
@pytest.mark.timeout(900)
def test_readme(block, folder):
    if not (Path(sys.executable).parent / "lorakit").exists():
        pytest.skip("lorakit is not installed in this environment: pip install -e .")
    if block.language == "python":
        execute(sys.executable, "-c", block.code, cwd=folder)
    else:
        execute("bash", "-euo", "pipefail", "-c", block.code, cwd=folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", sorted((REPOSITORY / "runs").glob("*.sh")), ids=lambda p: p.name)
def test_runs(script):
    execute("bash", str(script), cwd=REPOSITORY)


def test_every_command_block_is_marked():
    """A ```bash block without a mark would rot; what must not run is fenced without a language."""
    assert len(re.findall(r"^```(?:bash|python)$", README, flags=re.MULTILINE)) == len(blocks(README)) > 0


def test_the_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    pages = [README, (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), (REPOSITORY / ".ci/run").read_text(encoding="utf-8")]
    named = {word for page in pages for word in re.findall(r"^`?make (\w+)", page, flags=re.MULTILINE)}
    assert named
    assert named <= targets


def test_links_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert target.startswith("https://") or (REPOSITORY / target).exists(), f"{page}: {target}"


def test_the_tree_is_true():
    """Every folder that README's tree names exists, and every room of the package is named."""
    named = re.findall(r"^  (\w+)/ ", README, flags=re.MULTILINE)
    rooms = [p.name for p in (REPOSITORY / "src/lorakit").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert sorted(named) == sorted(rooms)


def test_the_methods_listed_are_there():
    """What README lists under "What there is" are registered methods, each once. It need not name all: a new method is two files."""
    listed = re.findall(r"^- \*\*.*$", README.split("\n## What there is\n")[1].split("\n## ")[0], flags=re.MULTILINE)
    named = [name for line in listed for name in re.findall(r"`(\w+)`", line)]
    assert len(named) == len(set(named)) > 20
    assert set(named) <= set(list_methods())


def test_a_marked_command_gets_its_flags():
    (block,) = blocks("<!-- test slow: lorakit train += --max-steps 2 -->\n```bash\nlorakit train --r 4  # say\nlorakit list\n```")
    assert block == Block("bash", "lorakit train --r 4   --max-steps 2 # say\nlorakit list\n", slow=True)
