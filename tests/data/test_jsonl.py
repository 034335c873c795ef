"""JSON Lines and JSON: rows are read when asked for, and what cannot be read is named with its line."""

import copy
import json
import os
import pickle

import pytest

from lorakit.core.errors import DataError
from lorakit.data import records
from lorakit.data.jsonl import JsonLines, open_json
from lorakit.data.row import BadRow

ROWS = [{"text": f"row {i}"} for i in range(7)]


def written(tmp_path, content, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def all_of(found):
    return [found.read(i) for i in range(len(found))]


def test_lines_are_read_in_any_order_and_again_in_another_process(tmp_path):
    found = JsonLines(written(tmp_path, "\n".join(["", *map(json.dumps, ROWS), "", " "])))
    assert len(found) == len(ROWS)
    assert [found.read(i) for i in (3, 0, 6, 3)] == [ROWS[i] for i in (3, 0, 6, 3)]
    assert found.where(2).endswith("data.jsonl, line 4")
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert all_of(other) == ROWS
    assert len(pickle.dumps(found)) < 1000


@pytest.mark.parametrize("change", [{"AT_ONCE": 3}, {"_pread": records._seek_and_read}])
def test_reading_by_parts_and_without_pread_gives_the_same(tmp_path, monkeypatch, change):
    for name, value in change.items():
        monkeypatch.setattr(records, name, value)
    found = JsonLines(written(tmp_path, "\n".join(map(json.dumps, ROWS))))
    assert [found.read(i) for i in (5, 0, 6, 1)] == [ROWS[i] for i in (5, 0, 6, 1)]
    assert all_of(open_json(written(tmp_path, json.dumps(ROWS), "list.json"))) == ROWS


def test_a_file_that_changes_is_an_error_in_this_process_and_in_another(tmp_path):
    path = written(tmp_path, '{"text": "a"}\n{"text": "b"}\n')
    found, before = JsonLines(path), pickle.dumps(JsonLines(path))
    found.read(0)
    os.utime(path, ns=(1, 1))
    for one in (found, pickle.loads(before)):
        with pytest.raises(DataError, match=r"data\.jsonl changed while it was being read") as error:
            one.read(1)
        assert not isinstance(error.value, BadRow), "no row to skip"


def test_a_list_a_wrapper_lines_and_one_row_are_all_json(tmp_path):
    for text in (
        json.dumps(ROWS), json.dumps(ROWS, indent=2), json.dumps({"data": ROWS, "version": 1}), json.dumps({"train": ROWS}, indent=1),
        "\n".join(map(json.dumps, ROWS)), "\ufeff" + json.dumps(ROWS), "\ufeff\n" + "\n".join(map(json.dumps, ROWS)),
    ):  # fmt: skip
        assert all_of(open_json(written(tmp_path, text, "a.json"))) == ROWS
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for text in (json.dumps(chat), json.dumps(chat, indent=1)):
        assert all_of(open_json(written(tmp_path, text, "a.json"))) == [chat]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text": "b', r"a\.json is not JSON .*; the file seems to be cut off in the middle"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
        ("3", "is a JSON int; expected a list of objects"),
        ('{"train": [{"text": "a"}], "test": [], "data": [1]}', r"holds several lists \(data, train\)"),
        (b"\xff\xfe[\0", "is UTF-16 or UTF-32; save it as UTF-8"),
        (b'[{"text": "\xff"}]', r"a\.json is not UTF-8"),
        ('[{"text": "a"\0}]', "NUL byte"),
    ],
)
def test_bad_json_is_one_clear_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as error:
        open_json(written(tmp_path, content, "a.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b'{"a": 1, "a": 2}', "line 2 gives the key 'a' twice; keep one", "key given twice"),
        (b'{"b": {"a": 1, "a": 2}}', "line 2 gives the key 'a' twice", "key given twice"),
        (b'{"a": NaN}', "line 2 holds NaN, which is not JSON", "NaN"),
        (b'{"a": -Infinity}', "line 2 holds -Infinity", "NaN"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "line 2 is nested more than 64 levels deep", "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"line 2 is not JSON \(it cannot be read\)", "not JSON"),
        (b"\xff{}", r"line 2 is not UTF-8 \(byte 0xff\)", "not UTF-8"),
        (b'{"a": "\0"}', "line 2 holds a NUL byte", "NUL byte"),
        (b'{"text": "a"', "line 2 is not JSON", "not JSON"),
        (b"null", "line 2 is a JSON NoneType, not an object", "not an object"),
    ],
)
def test_a_bad_line_says_why_in_a_few_words_too(tmp_path, line, message, reason):
    found = JsonLines(written(tmp_path, b'{"text": "a"}\n' + line + b'\n{"text": "b"}'))
    with pytest.raises(BadRow, match=message) as error:
        found.read(1)
    assert reason in error.value.reason
    assert error.value.where.endswith("line 2")
    assert found.read(2) == {"text": "b"}, "the lines after it can be read"


def test_a_list_under_the_wrong_name_says_which_name(tmp_path):
    with pytest.raises(BadRow, match=r"line 1 is a JSON list, not an object: .*; a file that is one list must end in \.json"):
        JsonLines(written(tmp_path, '[{"text": "a"}]')).read(0)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 100)
    with pytest.raises(DataError, match="line 2 is longer than 0 MiB; expected one row a line"):
        JsonLines(written(tmp_path, '{"text": "a"}\n' + "x" * 200))


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl is no regular file"):
        JsonLines(tmp_path / "pipe.jsonl")
