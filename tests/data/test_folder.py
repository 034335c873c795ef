"""Folders: sides by the Hub's names, one kind of files; text folders, and text files too large to be one row."""

import json
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data import textfile
from lorakit.data.source import load_rows, load_source

ROWS = [{"text": f"row {i}"} for i in range(30)]


def lay(folder, **texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/dev-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("training/part.jsonl", "val/part.jsonl", "evaluation/part.jsonl"),
        ("my_train_file.jsonl", "my.valid.file.jsonl", "my-test-file.jsonl"),
    ],
)
def test_names_say_the_side(tmp_path, train, valid, test):
    lay(tmp_path, **{train: lines(ROWS), valid: lines(ROWS[:2]), test: "not read", "README.md": "# Data", "dataset_info.json": "{}"})
    found = load_source(tmp_path)
    assert (list(found.train), list(found.valid)) == (ROWS, ROWS[:2])
    assert found.notes[1] == f"{tmp_path}: files not read: 1 of test ({test.rsplit('/')[-1]})"
    (tmp_path / valid).unlink()
    found = load_source(tmp_path)
    assert len(found.train) + len(found.valid) == len(ROWS), "without a side of its own it is split by hash"


def test_files_without_a_side_are_one_sequence_and_beside_others_are_noted(tmp_path):
    lay(tmp_path, **{"a.jsonl": lines(ROWS[:10]), "b.json": json.dumps(ROWS[10:])})
    assert load_rows(tmp_path, "train", valid=tmp_path) == ROWS
    lay(tmp_path, **{"train.jsonl": lines(ROWS[:4])})
    found = load_source(tmp_path, valid=tmp_path)
    assert list(found.train) == ROWS[:4]
    assert any(note.endswith("files not read: 2 of other (a.jsonl)") for note in found.notes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": "{}", "b.csv": "a"}, r"holds JSON \(a\.jsonl\) and CSV \(b\.csv\) files; name one file"),
        ({"a.jsonl": "{}", "b.txt": "a"}, r"holds text files \(b\.txt\) and data files \(a\.jsonl\); name one .*data_format=text"),
        ({"test.jsonl": "{}"}, "has no split called 'train'; it has 'test'"),
        ({"train.jsonl": lines(ROWS), "valid.jsonl": '{"prompt": "a", "completion": "b"}'}, "mixed formats: .* text data and .* pair data"),
    ],
)
def test_a_folder_of_several_kinds_says_what_to_name(tmp_path, files, message):
    lay(tmp_path, **files)
    with pytest.raises(DataError, match=message) as error:
        load_source(tmp_path)
    assert "\n" not in str(error.value)


def test_data_format_text_reads_the_text_files_of_a_mixed_folder(tmp_path):
    lay(tmp_path, **{"a.jsonl": "{", "b.txt": "b", "c.md": "c"})
    assert load_rows(tmp_path, "train", valid=tmp_path, data_format="text") == [{"text": "b"}, {"text": "c"}]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(textfile, "PIECE", 16)


@given(text=st.text(alphabet="abé\U0001f600 \n\n", max_size=120), fraction=st.floats(0.05, 0.95))
@example(text="aaaéé\U0001f600\U0001f600a\na", fraction=0.5)  # a cut leaves a piece of nothing but the end of a line: it is no row
def test_a_large_text_file_is_cut_into_pieces_and_no_letter_is_lost(tmp_path_factory, text, fraction):
    letters = "".join(text.split())
    path = tmp_path_factory.mktemp("large") / "a.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfile, "PIECE", 16)
        if not text.strip():
            with pytest.raises(DataError):
                load_rows(path, "train", valid=path)
            return
        rows = load_rows(path, "train", valid=path)
        pieces = [row["text"] for row in rows]
        assert all(len(piece.encode()) <= 16 for piece in pieces)
        assert "".join("".join(pieces).split()) == letters
        for one, piece in enumerate(pieces[:-1]):
            assert piece.endswith("\n") or "\n" not in piece, (one, pieces)
        try:
            sides = load_source(path, valid_fraction=fraction)
        except DataError as error:
            if "single line" not in str(error) and "one side of its cut" not in str(error):
                raise
            return
        both = [row["text"] for side in (sides.train, sides.valid) for row in side]
        assert "".join("".join(both).split()) == letters
        assert pickle.loads(pickle.dumps(sides.train)) == sides.train


def test_a_small_file_is_one_row_and_a_mark_at_its_beginning_is_no_text(tmp_path, small):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\ncd")
    assert load_rows(tmp_path / "a.txt", "train", valid=tmp_path / "a.txt") == [{"text": "ab\ncd"}]
    assert [row["text"] for side in ("train", "valid") for row in load_rows(tmp_path / "a.txt", side)] == ["ab\n", "cd"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n" * 20 + b"\xe9\n", r"a\.txt, line 21 is not UTF-8 \(byte 0xe9\)"),
        (b"a\n" * 20 + b"\0\n", r"a\.txt, line 21 holds a NUL byte"),
        (b"\xff\xfea\0", "is UTF-16 or UTF-32; save it as UTF-8"),
    ],
)
def test_what_is_no_text_names_its_line_in_any_piece(tmp_path, small, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / "a.txt", "train")
