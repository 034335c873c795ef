"""`list`, `show` and `new-method`, errors included."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorakit.cli import docs, page, scaffold
from lorakit.cli.main import app
from lorakit.core.method import describe, get_method, list_methods

RUN = CliRunner()
REPOSITORY = Path(__file__).parents[2]


def run(*arguments):
    """stdout of a command that succeeds."""
    result = RUN.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    """The one line of a command that fails."""
    result = RUN.invoke(app, list(arguments))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    return result.stderr


# --- list -----------------------------------------------------------------------------------------------------------------


def test_list_has_a_row_for_every_method():
    lines = run("list").splitlines()
    assert lines[0].split() == ["id", "paper", "survey", "heading", "kind", "parameters"]
    assert sorted(line.split()[0] for line in lines[1:] if not line.startswith(" ")) == list_methods()
    assert max(map(len, lines)) <= 140


def test_list_shows_parameters_with_defaults():
    assert "niter=0" in run("list")
    assert "sites=all-linear" in run("list")


def test_list_json_is_the_registry():
    entries = json.loads(run("list", "--json"))
    assert sorted(e["name"] for e in entries) == list_methods()
    dora = next(e for e in entries if e["name"] == "dora")
    assert dora["paper"] == "arXiv:2402.09353"
    assert dora["heading"] == "learning"
    assert dora["parameters"]["alpha"] == 16.0


# --- show -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_methods())
def test_show_prints_paper_code_and_parts(name):
    stdout, entry = run("show", name), describe(name)
    for line in page.paper(entry).splitlines():
        assert line.rstrip() in stdout  # equations come out as they were written
    assert f'@method("{name}"' in stdout
    assert all(f"{part} = " in stdout for part in page.parts(get_method(name)))


def test_show_says_where_a_part_is_defined():
    stdout = run("show", "pissa")
    assert "init = Principal(niter=0)\n    lorakit/methods/learning/pissa.py:" in stdout


def test_show_of_a_composition_shows_each_method():
    stdout = run("show", "qlora+dora")
    assert '@method("qlora"' in stdout
    assert '@method("dora"' in stdout
    assert "LoRA on a base stored in four bits" in stdout
    assert "combine = DecomposedSpec" in stdout


def test_show_names_the_nearest_method():
    assert refused("show", "pisssa") == "error: no method is called 'pisssa'. Did you mean 'pissa'?\n"


def test_parts_leave_out_what_is_empty():
    found = page.parts(get_method("adalora"))
    assert {"delta", "init", "penalties[0]", "controllers[0]"} <= set(found)
    assert not {"recipe", "unfreeze", "optim"} & set(found)


# --- docs -----------------------------------------------------------------------------------------------------------------


def test_every_method_has_a_page():
    pages = docs.pages()
    assert set(pages) == {"methods/index.md"} | {f"methods/{name}.md" for name in list_methods()}
    for name in list_methods():
        text = pages[f"methods/{name}.md"]
        assert text.startswith(f"# {page.paper(describe(name)).splitlines()[0].removesuffix('.')}\n")
        assert all(f"| `{p}` |" in text for p in describe(name).parameters)


# --- new-method -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like one."""
    (tmp_path / "src/lorakit/methods/learning").mkdir(parents=True)
    return tmp_path


def test_new_method_writes_two_files(checkout):
    stdout = run("new-method", "foo_bar", "--root", str(checkout))
    written = sorted(p.relative_to(checkout).as_posix() for p in checkout.rglob("*.py") if p.name != "__init__.py")
    assert written == ["src/lorakit/methods/learning/foo_bar.py", "tests/methods/learning/test_foo_bar.py"]
    assert all(path in stdout for path in written)
    assert "CHANGELOG" in stdout


@pytest.mark.parametrize("heading", scaffold.HEADINGS)
def test_a_heading_opens_with_its_first_method(checkout, heading):
    run("new-method", "foo", "--heading", heading, "--root", str(checkout))
    method = checkout / f"src/lorakit/methods/{heading}/foo.py"
    assert f"survey {scaffold.HEADINGS[heading].section}" in method.read_text()
    assert (method.parent / "__init__.py").read_text().startswith(f'"""Survey {scaffold.HEADINGS[heading].section}: ')


def test_every_heading_of_the_registry_is_known():
    assert {describe(name).heading for name in list_methods() if describe(name).make.__module__.startswith("lorakit.")} <= set(
        scaffold.HEADINGS
    )


def test_outside_a_checkout_a_plugin_is_written(tmp_path):
    stdout = run("new-method", "foo", "--root", str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lorakit_foo.py", "test_lorakit_foo.py"]
    assert '[project.entry-points."lorakit.methods"]\n    foo = "lorakit_foo"' in stdout


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("foo-bar", "Did you mean 'foo_bar'?"),
        ("Foo", "Did you mean 'foo'?"),
        ("2fast", "beginning with a letter"),
        ("lambda", "no keyword"),
        ("", "lower-case letters"),
        ("../evil", "Did you mean 'evil'?"),
    ],
)
def test_impossible_names_are_refused(checkout, name, hint):
    assert hint in refused("new-method", name, "--root", str(checkout))
    assert not list(checkout.rglob("*.py"))


def test_existing_names_are_refused(checkout):
    assert "a method called 'dora' exists already" in refused("new-method", "dora", "--heading", "experts", "--root", str(checkout))
    run("new-method", "foo", "--root", str(checkout))
    assert "foo.py" in refused("new-method", "foo", "--heading", "experts", "--root", str(checkout))
    assert not (checkout / "src/lorakit/methods/experts").exists()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "test_lorakit_foo.py").write_text("mine")
    assert "exists already" in refused("new-method", "foo", "--root", str(tmp_path))
    assert not (tmp_path / "lorakit_foo.py").exists()


def test_unknown_headings_and_roots_are_refused(checkout):
    assert "Did you mean 'learning'" in refused("new-method", "foo", "--heading", "lerning", "--root", str(checkout))
    assert "is not a folder" in refused("new-method", "foo", "--root", str(checkout / "nowhere"))


def python(*arguments, cwd, path):
    """Run this interpreter in `cwd`, with `path` in front of everything installed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_fresh_plugin_passes_its_own_test(tmp_path):
    run("new-method", "foo", "--root", str(tmp_path))
    info = tmp_path / "foo-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foo\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[lorakit.methods]\nfoo = lorakit_foo\n")
    assert "2 passed" in python("-m", "pytest", "-q", "test_lorakit_foo.py", cwd=tmp_path, path=[tmp_path, REPOSITORY / "src"])


def test_fresh_files_are_clean(checkout):
    pytest.importorskip("ruff")
    run("new-method", "foo", "--root", str(checkout))
    (checkout / "pyproject.toml").write_bytes((REPOSITORY / "pyproject.toml").read_bytes())
    python("-m", "ruff", "check", "--no-cache", ".", cwd=checkout, path=[])
    python("-m", "ruff", "format", "--no-cache", "--check", ".", cwd=checkout, path=[])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fresh_method_passes_every_law_untouched(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "out", "site", "base"))
    run("new-method", "foo", "--root", str(copy))
    places = ("tests/laws", "tests/methods/learning/test_foo.py")
    stdout = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "foo", *places, cwd=copy, path=[copy / "src"])
    assert int(stdout.rsplit(" passed", 1)[0].split()[-1]) >= 20 + 2, "the laws did run on it, and so did its own test"
