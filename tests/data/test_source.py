import csv
import json
import pickle
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import DataError, MissingExtra
from lorakit.data import builtin
from lorakit.data.records import Bytes
from lorakit.data.source import Reading, load_rows, load_source

ROWS = [{"text": f"row {i}"} for i in range(40)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_jsonl_is_split_by_hash_in_file_order(jsonl):
    train, valid = load_rows(jsonl, "train"), load_rows(str(jsonl), "valid")
    assert train
    assert valid
    assert sorted([*train, *valid], key=ROWS.index) == ROWS
    assert train == [row for row in ROWS if row in train]
    assert load_rows(jsonl, "valid", seed=1) != valid
    assert len(load_rows(jsonl, "valid", valid_fraction=0.5)) > len(valid)


def test_a_validation_source_leaves_the_training_side_whole(jsonl, tmp_path):
    other = tmp_path / "valid.jsonl"
    other.write_text('{"text": "held"}\n')
    assert load_rows(jsonl, "train", valid=other) == ROWS
    assert load_rows(jsonl, "valid", valid=other) == [{"text": "held"}]
    assert load_rows(jsonl, "valid", valid="builtin:xml/code") == builtin.load("xml", "code", "valid")


def test_separators_inside_strings_do_not_end_lines_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "a\u2028b\u0085c"}\r\n\n{"text": "d"}'.encode())
    rows = load_rows(path, "train", valid=path)
    assert rows == [{"text": "a\u2028b\u0085c"}, {"text": "d"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"data\.jsonl, line 2 is not JSON \(Expecting value\): '\{\"text\":'"),
        (b'{"text": "a"}\n["a"]\n', "line 2 is a JSON list, not an object"),
        (b'\n{"text": "a"}\n\n{"txt": "a"}', r"line 4 has the keys \{txt\}"),
        (b'{"text": "a"}\n{"text": "\xff"}', r"line 2 is not UTF-8 \(byte 0xff\)"),
        (b'{"text": "a", "label": ' + b"1" * 5000 + b"}", r"line 1 is not JSON \(it cannot be read\): .{62}; expected"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"\n \n", "holds no rows"),
        (b"", "holds no rows"),
        (b'{"text": "a"}', r"data\.jsonl: one row cannot be divided into training and validation"),
    ],
)
def test_bad_jsonl_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_rows(path, "train")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@given(st.text(alphabet="ab \n\n", min_size=1, max_size=80), st.floats(0.05, 0.95))
def test_a_lone_file_is_cut_at_a_line_and_nothing_is_lost(tmp_path_factory, text, fraction):
    path = tmp_path_factory.mktemp("lone") / "a.txt"
    path.write_text(text)
    if len([line for line in text.split("\n") if line.strip()]) < 2:
        with pytest.raises(DataError, match=r"holds no text|single line"):
            load_rows(path, "train")
        return
    train, valid = ([row["text"] for row in load_rows(path, side, valid_fraction=fraction)] for side in ("train", "valid"))
    assert train[0] + valid[0] == text
    assert train[0].strip()
    assert valid[0].strip()
    assert train[0].endswith("\n")


def test_a_lone_file_holds_out_its_last_tenth(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("".join(f"line {i:03}\n" for i in range(100)))
    assert load_rows(path, "valid")[0]["text"].startswith("line 090")


def test_a_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    texts = {"b.txt": "b", "a/z.py": "z", "a/y.md": "y", "c.rst": "c", "a/__init__.py": ""}
    passed_over = {".git/x.txt": "x", ".h.txt": "h", "d.bin": "d"}
    for name, text in {**texts, **passed_over}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    rows = load_rows(tmp_path, "train", valid=tmp_path)
    assert [row["text"] for row in rows] == ["y", "z", "b", "c"]
    assert len(load_rows(tmp_path, "train")) + len(load_rows(tmp_path, "valid")) == 4


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"a\nb\n\xe9")
    (tmp_path / "table.xlsx").write_text("a,b")
    (tmp_path / "rows.jsonl.gz").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "bad.txt": r"bad\.txt, line 3 is not UTF-8 \(byte 0xe9\)",
        "table.xlsx": r"ends in '\.xlsx', which is not read; expected a folder or a file ending in one of \.jsonl",
        "rows.jsonl.gz": r"ends in '\.gz', which is not read.*; unpack it first",
        "empty": r"holds no text in files ending in \.txt, \.md, \.rst, \.py, and no data in \.jsonl, \.json, \.csv",
        "tabel.xlsx": r"is no file or folder\. Did you mean '.*table\.xlsx'\?",
    }.items():
        with pytest.raises(DataError, match=message):
            load_rows(tmp_path / name, "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("asyncio/code", "Did you mean 'builtin:asyncio/code'"),
        ("someone/dataset", "for a dataset of the Hub 'hf:someone/dataset'"),
        ("x" * 400, "no file or folder"),
        ("a\0b", "no file or folder"),
        ("builtin:asyncoi/code", "Did you mean 'builtin:asyncio/code'"),
        ("~nobody-of-this-name/rows.jsonl", "no file or folder"),
        (f"{__file__},hf:a/b", "are typed '{.*test_source.py: 1, hf:a/b: 1}'"),
        (f"{__file__}:0.5", "with its weight is typed '{.*test_source.py: 0.5}'"),
    ],
)
def test_an_unknown_name_is_answered_with_what_to_type(name, message):
    with pytest.raises(DataError, match=message):
        load_rows(name, "train")


def test_an_unknown_split_is_refused(jsonl):
    with pytest.raises(DataError, match="'train' or 'valid'"):
        load_rows(jsonl, "test")


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_a_hub_dataset_keeps_its_own_validation_split_or_is_split_by_hash(monkeypatch):
    asked = []
    splits = {"train": ROWS, "validation": [{"text": "held"}]}
    hub(monkeypatch, lambda *args: asked.append(args) or splits)
    assert load_rows("hf:org/name:config", "train") == ROWS
    assert load_rows("hf:org/name", "valid") == [{"text": "held"}]
    assert asked == [("org/name", "config"), ("org/name", None)]
    del splits["validation"]
    train, valid = load_rows("hf:org/name", "train"), load_rows("hf:org/name", "valid")
    assert len(train) + len(valid) == len(ROWS)
    assert valid
    assert load_rows("hf:org/name", "train", valid="hf:org/name") == ROWS


def test_hub_failures_are_one_line(monkeypatch):
    def offline(*_):
        raise ConnectionError("cannot reach the Hub\nlong story")

    hub(monkeypatch, offline)
    with pytest.raises(DataError, match=r"hf:a/b could not be loaded \(ConnectionError: cannot reach the Hub\)"):
        load_rows("hf:a/b", "train")
    hub(monkeypatch, lambda *_: {"test": ROWS})
    with pytest.raises(DataError, match="no split called 'train'; it has 'test'"):
        load_rows("hf:a/b", "train")
    hub(monkeypatch, lambda *_: {"train": [{"qestion": "a"}]})
    with pytest.raises(DataError, match=r"hf:a/b, train row 1 has no known set of keys: \{qestion\}"):
        load_rows("hf:a/b", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lorakit\[data\]'"):
        load_rows("hf:a/b", "train")


@pytest.mark.slow
def test_the_real_datasets_library_reads_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "set" / "validation.jsonl").write_text('{"text": "held"}\n')
    assert load_rows(f"hf:{tmp_path / 'set'}", "train") == ROWS
    assert load_rows(f"hf:{tmp_path / 'set'}", "valid") == [{"text": "held"}]


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_bad_rows_are_left_out_counted_and_listed(tmp_path):
    path = tmp_path / "data.jsonl"
    bad = ["{", '{"text": ""}', '{"text": 3}', '{"txt": "a"}', '{"text": "a", "text": "b"}']
    path.write_text(lines(*ROWS[:2], *bad[:2], *ROWS[2:20], *bad[2:], *ROWS[20:]))
    with pytest.raises(DataError, match="line 3 is not JSON .*; skip_bad .--skip-bad. leaves such rows out and counts them$"):
        load_source(path)
    found = load_source(path, reading=Reading(skip_bad=True))
    assert sorted([*found.train, *found.valid], key=ROWS.index) == ROWS
    assert (found.train, found.valid) == tuple(good_sides(tmp_path))
    assert [one.where.rsplit(" ", 1)[1] for one in found.skipped] == ["3", "4", "23", "24", "25"]
    assert [(one.field, one.reason) for one in found.skipped] == [
        ("", "not JSON"), ("text", "empty text"), ("text", "an integer for a string"), ("text", "other keys than the first row's"),
        ("text", "key given twice"),
    ]  # fmt: skip
    account = next(note for note in found.notes if "left out" in note)
    assert "5 of 45 rows cannot be used (1 not JSON, 1 empty text," in account
    listed = [note for note in found.notes if note.startswith("  ")]
    assert [one.message for one in found.skipped] == [note.strip() for note in listed]
    assert all("data.jsonl, line " in note for note in listed)


def good_sides(tmp_path):
    (tmp_path / "good.jsonl").write_text(lines(*ROWS))
    return [list(load_rows(tmp_path / "good.jsonl", side)) for side in ("train", "valid")]


def test_twenty_bad_rows_are_listed_and_all_are_known(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(lines(*ROWS, *["x"] * 30))
    found = load_source(path, reading=Reading(skip_bad=True))
    assert len(found.skipped) == 30
    assert sum(note.startswith("  ") for note in found.notes) == 21
    assert found.notes[-1] == "  and 10 more"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS[:3], *["x"] * 4], r"4 of 7 rows cannot be used \(4 not JSON\); too many to leave out\. The first: .*line 4 is not JSON"),
        (["x"] * 4, "no row can be used: .*line 1 is not JSON"),
    ],
)
def test_more_bad_rows_than_good_ones_are_an_error_anyway(tmp_path, rows, message):
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    with pytest.raises(DataError, match=message) as error:
        load_source(tmp_path / "a.jsonl", reading=Reading(skip_bad=True))
    assert "\n" not in str(error.value)


def test_a_bad_first_row_does_not_decide_the_format(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("{", {"nothing": 1}, *({"question": row["text"], "answer": "a"} for row in ROWS)))
    found = load_source(tmp_path / "a.jsonl", reading=Reading(skip_bad=True))
    assert found.shape == "pair"
    assert len(found.skipped) == 2


def test_the_format_and_why_is_a_note_and_can_be_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*({"q": row["text"], "a": "x", "id": 1} for row in ROWS)))
    found = load_source(tmp_path / "a.jsonl", reading=Reading(columns={"prompt": "q", "completion": "a"}))
    assert found.notes == (f"{tmp_path}/a.jsonl: pair: columns q as prompt, a as completion; not used: id",)
    with pytest.raises(DataError, match=r"line 1 has no columns of chat data: \{a, id, q\}"):
        load_source(tmp_path / "a.jsonl", reading=Reading("chat"))
    with pytest.raises(DataError, match=r"line 1 has no 'quest', but \{a, id, q\}"):
        load_source(tmp_path / "a.jsonl", reading=Reading(columns={"prompt": "quest"}))


def test_a_column_may_be_missing_from_the_first_row(tmp_path):
    rows = [{"q": "a", "r": "b"}, {"q": "a", "more": "c", "r": "d"}]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    columns = {"instruction": "q", "input": "more", "output": "r"}
    made = load_rows(tmp_path / "a.jsonl", "train", valid=tmp_path / "a.jsonl", columns=columns)
    assert [row["messages"][0]["content"] for row in made] == ["a", "a\nc"]


def test_hub_columns_that_a_row_cannot_hold_are_left_out(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [row["text"] for row in ROWS], "raw": [b"x"] * len(ROWS)})
    hub(monkeypatch, lambda *_: {"train": rows})
    found = load_source("hf:a/b", valid="hf:a/b")
    assert found.train == ROWS
    assert any("columns left out, as they hold neither text nor numbers: raw" in note for note in found.notes)
    assert pickle.loads(pickle.dumps(found.train)) == ROWS


def test_an_own_validation_side_of_another_shape_is_mixed_formats(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*ROWS))
    (tmp_path / "b.jsonl").write_text(lines({"prompt": "a", "completion": "b"}))
    with pytest.raises(DataError, match=r"mixed formats: .*a\.jsonl holds text data and .*b\.jsonl pair data; expected one shape"):
        load_source(tmp_path / "a.jsonl", valid=tmp_path / "b.jsonl")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "größer"},
        {"text": "a", "label": 1},
        {"prompt": "für", "completion": "b", "label": True},
        {"tokens": ["a", "é"], "tags": ["O", 1]},
        {"messages": [{"role": "user", "content": "¿"}, CALL]},
        {"conversations": [{"from": "human", "value": "à"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "chosen": "ß", "rejected": "b"},
    ],
    ids=lambda row: ",".join(row),
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_where_good_rows_stand_is_never_asked(tmp_path, monkeypatch, row, kind):
    """It is known by counting the file's lines up to there: of every row, that would take hours for a large file."""
    path, rows = tmp_path / f"rows.{kind}", [row | {"kind": i} for i in range(30)]
    if kind == "jsonl":
        path.write_text(lines(*rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows({key: json.dumps(v) if isinstance(v, list | bool) else v for key, v in one.items()} for one in rows)
    monkeypatch.setattr(Bytes, "line_at", lambda *_: pytest.fail("lines were counted"))
    found = load_source(path)
    assert len([*found.train, *found.valid]) == 30


def test_lines_are_counted_once_for_many_bad_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join('{"text": "a"}\n{"text": ""}\n' for _ in range(2000)) + '{"text": "b"}\n')
    read = []
    at = Bytes.at
    monkeypatch.setattr(Bytes, "at", lambda self, start, end: read.append(end - start) or at(self, start, end))
    found = load_source(path, reading=Reading(skip_bad=True))
    assert [one.where.rsplit(" ", 1)[1] for one in found.skipped] == [str(2 * i) for i in range(1, 2001)]
    assert sum(read) < 5 * path.stat().st_size
    assert [Bytes(path).line_at(offset) for offset in (0, 14, 28, 14)] == [1, 2, 3, 2]
