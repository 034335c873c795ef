import hashlib
import importlib.util
import json
import lzma
import platform
import re
import sysconfig
from importlib.resources import files
from pathlib import Path

import pytest

from lorakit.core.errors import DataError
from lorakit.data import builtin
from lorakit.data.docstrings import documented, first_paragraph
from lorakit.data.row import check_rows, data_hash

SIDES = ("train", "valid")
PINNED = "3.11.7"


def both(name):
    return [builtin.load_name(name, side) for side in SIDES]


@pytest.mark.parametrize("name", builtin.NAMES)
def test_every_task_has_two_disjoint_sides_of_valid_rows(name):
    train, valid = both(name)
    assert train
    assert valid
    for rows in (train, valid):
        assert check_rows((str(i), row) for i, row in enumerate(rows)) == rows
        assert len({json.dumps(row) for row in rows}) == len(rows)
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in valid}
    assert data_hash(builtin.load_name(name, "train")) == data_hash(train)


@pytest.mark.parametrize("task", builtin.TASKS)
def test_code_holds_out_whole_files_of_about_an_eighth_of_the_bytes(task):
    train, valid = ([row["text"] for row in rows] for rows in both(f"builtin:{task}/code"))
    assert sorted(train + valid) == sorted(builtin.source_files(task).values())
    share = sum(len(t.encode()) for t in valid) / sum(len(t.encode()) for t in train + valid)
    assert (0.10 <= share <= 0.15) or (task == "logging" and share < 0.21)


def test_rows_are_the_callers_own():
    first = builtin.load("xml", "code", "train")
    first[0]["text"] = "changed"
    assert builtin.load("xml", "code", "train")[0]["text"] != "changed"
    first = builtin.load("all", "classify", "train")
    first[0]["text"] = "changed"
    assert builtin.load("all", "classify", "train")[0]["text"] != "changed"


def test_chat_asks_both_ways_and_no_function_name_is_on_both_sides():
    train, valid = both("builtin:asyncio/chat")
    names = []
    for rows in (train, valid):
        signatures = [row["messages"][1]["content"] for row in rows if row["messages"][1]["content"].startswith(("def ", "async def "))]
        assert 2 * len(signatures) >= len(rows) - 10
        assert all(s.endswith(":") and "\n" not in s for s in signatures)
        names.append({re.match(r"(?:async )?def (\w+)\(", s)[1] for s in signatures})
    assert not names[0] & names[1]
    question = "Write the signature of the Python function gather: "
    asked = [row["messages"][1]["content"] for row in train + valid if row["messages"][0]["content"].startswith(question)]
    assert asked == ["def gather(*coros_or_futures, return_exceptions=False):"]


def test_classify_covers_every_package_and_names_none():
    train, valid = both("builtin:classify")
    for rows in (train, valid):
        assert {row["label"] for row in rows} == set(builtin.TASKS)
        assert not any(re.search(rf"\b{task}\b", row["text"], re.IGNORECASE) for row in rows for task in builtin.TASKS)
    assert 0.08 < len(valid) / len(train + valid) < 0.16


def test_masking_takes_whole_words_only():
    assert builtin.mask_names("Email via xml.dom, xmlrpc and XML_x") == "this package via this package.dom, xmlrpc and this package_x"


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(DataError, match=r"'builtin:asyncoi/code'. Did you mean 'builtin:asyncio/code'"):
        builtin.load_name("builtin:asyncoi/code", "train")
    with pytest.raises(DataError, match=r"no built-in task is called 'emial'\. Did you mean 'email'"):
        builtin.load("emial", "code", "train")
    with pytest.raises(DataError, match=r"no built-in kind is called 'cod'\. Did you mean 'code'"):
        builtin.load("email", "cod", "train")
    with pytest.raises(DataError, match="write 'builtin:classify'"):
        builtin.load("email", "classify", "train")
    with pytest.raises(DataError, match="'train' or 'valid'"):
        builtin.load("email", "code", "test")


def test_the_readme_tells_the_truth_about_the_files_and_the_license_is_there():
    folder = files("lorakit.data") / "tasks"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for task in builtin.TASKS:
        packed = (folder / f"{task}.jsonl.xz").read_bytes()
        assert hashlib.sha256(packed).hexdigest() in readme
        assert hashlib.sha256(lzma.decompress(packed)).hexdigest() in readme
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (folder / "LICENSE.PSF.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(platform.python_version() != PINNED, reason=f"the vendored sources are those of Python {PINNED}")
def test_the_vendored_files_are_the_interpreters_own_bytes():
    stdlib = Path(sysconfig.get_path("stdlib"))
    for task in builtin.TASKS:
        for path, text in builtin.source_files(task).items():
            assert (stdlib / path).read_bytes() == text.encode()


def test_the_vendoring_script_writes_these_bytes():
    path = Path(__file__).parents[2] / "runs" / "vendor_tasks.py"
    spec = importlib.util.spec_from_file_location("vendor_tasks", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.TASKS == builtin.TASKS
    rows = [{"path": p, "text": t} for p, t in builtin.source_files("importlib").items()]
    assert script.pack(rows)[0] == lzma.decompress((files("lorakit.data") / "tasks" / "importlib.jsonl.xz").read_bytes())


def test_documented_reads_modules_classes_and_functions_without_running_them():
    source = """
'Module.\\n\\nMore.'
raise SystemExit
class A:
    "Class."
    @property
    async def f(self, a: int = 1, *, b) -> "x":
        '''Does.
        It.

        More.'''
    def g(self): pass
"""
    found = list(documented(source, module="m"))
    assert [(d.name, d.signature) for d in found] == [("m", None), ("A", None), ("f", "async def f(self, a: int=1, *, b) -> 'x':")]
    assert [first_paragraph(d.docstring) for d in found] == ["Module.", "Class.", "Does. It."]
