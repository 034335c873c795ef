"""Tables: the same rows from CSV, Parquet and Arrow, read when asked for; what is no table is one line."""

import csv
import datetime
import io
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.records import Blocks
from lorakit.data.row import BadRow
from lorakit.data.source import load_rows, load_source
from lorakit.data.tables import Tables, open_csv, saved_splits

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

ROWS = [{"prompt": f"question {i}\n,\"'", "completion": f"answer {i} é"} for i in range(1000)]


def written(tmp_path, content, name="a.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def all_of(found):
    return [found.read(i) for i in range(len(found))]


def as_csv(rows, **options):
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def files(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=400)
    written(tmp_path, as_csv(ROWS))
    written(tmp_path, as_csv(ROWS, delimiter="\t", lineterminator="\n"), "a.tsv")
    written(tmp_path, "\ufeff" + as_csv(ROWS, delimiter=";"), "b.csv")
    return [tmp_path / name for name in ("a.parquet", "a.arrow", "b.arrow", "a.csv", "a.tsv", "b.csv")]


def test_suffixes_are_read_in_any_case(tmp_path):
    for path in files(tmp_path):
        loud = path.rename(path.with_suffix(path.suffix.upper()))
        assert load_rows(loud, "train", valid=loud) == ROWS, loud
    notes = written(tmp_path, "some\nlines\n", "NOTES.TXT")
    assert load_rows(notes, "train", valid=notes) == [{"text": "some\nlines\n"}]


def test_every_kind_of_table_holds_the_same_rows_in_any_order(tmp_path):
    for path in files(tmp_path):
        rows = load_rows(path, "train", valid=path)
        assert rows == ROWS, path
        assert [rows[i] for i in (999, 0, 299, 300, 301, 5, -1)] == [ROWS[i] for i in (999, 0, 299, 300, 301, 5, -1)], path
        assert rows[10:900:77] == ROWS[10:900:77]
        assert pickle.loads(pickle.dumps(rows)) == ROWS
        sides = load_source(path)
        assert len(sides.train) + len(sides.valid) == 1000
        assert list(sides.valid) == list(load_source(tmp_path / "a.csv").valid), "the split is by content, not by file"


def test_shards_are_one_sequence(tmp_path):
    (tmp_path / "set").mkdir()
    for n in range(3):
        pq.write_table(pa.Table.from_pylist(ROWS[n * 300 : (n + 1) * 300]), tmp_path / "set" / f"train-0000{n}-of-00003.parquet")
    rows = load_rows(tmp_path / "set", "train", valid=tmp_path / "set")
    assert rows == ROWS[:900]


def test_columns_that_a_row_cannot_hold_are_left_out_with_a_note(tmp_path):
    table = pa.table({"text": ["a", "b"], "when": [datetime.datetime(2020, 1, 1)] * 2, "picture": [b"1", b"2"], "n": [{"x": [1.5]}] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    found = load_source(tmp_path / "a.parquet", valid=tmp_path / "a.parquet")
    assert list(found.train) == [{"text": "a", "n": {"x": [1.5]}}, {"text": "b", "n": {"x": [1.5]}}]
    assert any("columns left out, as they hold neither text nor numbers: when, picture" in note for note in found.notes)


def test_what_save_to_disk_wrote_is_read_without_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    sets = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list(ROWS[:3])})
    sets.save_to_disk(tmp_path / "both", num_shards={"train": 2, "validation": 1})
    found = load_source(tmp_path / "both")
    assert (list(found.train), list(found.valid)) == (ROWS, ROWS[:3])
    sets["train"].save_to_disk(tmp_path / "one")
    assert load_rows(tmp_path / "one", "train", valid=tmp_path / "one") == ROWS
    assert set(saved_splits(tmp_path / "both")) == {"train", "validation"}
    (tmp_path / "both" / "train" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00002\.arrow is missing; save the data set again"):
        load_source(tmp_path / "both")


def test_a_table_that_changes_is_an_error(tmp_path):
    path = files(tmp_path)[0]
    before = pickle.dumps(Tables([path]))
    pq.write_table(pa.Table.from_pylist(ROWS[:10]), path)
    with pytest.raises(DataError, match=r"a\.parquet changed while it was being read"):
        pickle.loads(before).read(0)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1\0\0", b"{}", b"\xff" * 100])
def test_what_is_no_table_is_one_line(tmp_path, name, content):
    with pytest.raises(DataError, match=rf"{name} cannot be read as {name[2:]}") as error:
        load_rows(written(tmp_path, content, name), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected a header and rows"),
        ("\n\n", "is empty"),
        ("a,b\n", "holds a header and no rows"),
        ("text,text\na,b\n", "the header names 'text' twice"),
        ("text,,label\na,b,c\n", "column 2 of the header has no name"),
        ("this is a long first line of a file that has no header at all and so is a row,b\na,b\n", "has no header: its first line is"),
        (b"\xff\xfet\0", "is UTF-16 or UTF-32"),
        ("what,ever\na,b\n", r"line 2 has no known set of keys: \{ever, what\}"),
    ],
)
def test_a_csv_without_a_usable_header_is_one_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as error:
        load_rows(written(tmp_path, content), "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "message", "reason"),
    [
        ("x,y,z", "line 4 has 3 cells and the header 2; put cells that hold a ',' in quotes", "not one cell a column"),
        ("x", "line 4 has 1 cells and the header 2", "not one cell a column"),
        (b"x,\xff", r"line 4 is not UTF-8 \(byte 0xff\)", "not UTF-8"),
        ("x,\0", "line 4 holds a NUL byte", "NUL byte"),
        ('x,"y"z', "line 4 is not CSV", "not CSV"),
    ],
)
def test_a_bad_record_names_its_line_and_the_next_ones_are_read(tmp_path, record, message, reason):
    record = record if isinstance(record, bytes) else record.encode()
    found = open_csv(written(tmp_path, b'text,label\n"a\nb",1\n' + record + b"\nc,2\n"))
    with pytest.raises(BadRow, match=message) as error:
        found.read(1)
    assert error.value.reason == reason
    assert found.read(2) == {"text": "c", "label": "2"}
    assert found.where(2).endswith("line 5")


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    found = open_csv(written(tmp_path, "\n\ntext,label\n\na,1\n\n\nb,2\n\n"))
    assert all_of(found) == [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]
    assert [found.where(i).rsplit(" ", 1)[1] for i in range(2)] == ["5", "8"]


def test_a_quote_left_open_says_so(tmp_path):
    with pytest.raises(DataError, match=r"line 3 is not CSV \(a quote is left open\)"):
        load_rows(written(tmp_path, 'text\na\n"b\nc\nd\n'), "train")


def test_a_long_cell_is_read(tmp_path):
    assert open_csv(written(tmp_path, f"text\n{'x' * 300_000}\n")).read(0) == {"text": "x" * 300_000}


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_module_writes_comes_back(tmp_path_factory, rows, end):
    rows = [{"a": a, "b": b} for a, b in rows]
    path = written(tmp_path_factory.mktemp("csv"), as_csv(rows, lineterminator=end, quoting=csv.QUOTE_ALL))
    assert all_of(open_csv(path)) == rows


def test_a_table_that_holds_fewer_rows_than_it_says_is_damaged():
    class Short(Blocks):
        def __len__(self) -> int:
            return 3

        def block(self, start: int, size: int) -> list[dict[str, str]]:
            return [{"text": "a"}, {"text": "b"}][start : start + size]

        def where(self, i: int) -> str:
            return f"rows.parquet, row {i + 1}"

    rows = Short()
    assert rows.read(1) == {"text": "b"}
    with pytest.raises(DataError, match="row 3 is missing: the file holds fewer rows"):
        rows.read(2)


def test_a_name_inside_a_column_that_is_no_text_is_one_line(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 4
    path = tmp_path / "d.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"content", b"con\xfdent"))
    with pytest.raises(DataError, match=r"d\.arrow cannot be read as arrow: .*decode byte 0xfd"):
        load_source(path)
