"""Configuration files: what they say is what is read, and what cannot be read is one line with its place."""

from pathlib import Path

import pytest

from lorakit.core.errors import BadParameter
from lorakit.train.config_file import DEEPEST, LARGEST, parse_value, read_mapping


def read(tmp_path: Path, content: str | bytes, name: str = "run.yaml") -> dict[str, object]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_mapping(path)


def test_numbers_are_numbers_and_dates_are_text(tmp_path: Path) -> None:
    text = "a: 1e-4\nb: 2.5e+3\nc: 3\nd: 2024-01-01\ne: 1:30\nf: true\ng: .5\nh: '1e-4'\ni: ~\nj: [1, 2.0]\nk: -1E3\nl: 0x1F"
    assert read(tmp_path, text) == {
        "a": 1e-4, "b": 2500.0, "c": 3, "d": "2024-01-01", "e": "1:30", "f": True, "g": 0.5, "h": "1e-4", "i": None, "j": [1, 2.0],
        "k": -1000.0, "l": 31,
    }  # fmt: skip
    assert [parse_value(word) for word in ("1e-4", "2e-5", "[q, 1]", "no")] == [1e-4, 2e-5, ["q", 1], False]
    with pytest.raises(ValueError, match="no YAML"):
        parse_value("[1")


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    json = '{"r": 8, "sites": ["q_proj"], "alpha": 1e1}'
    assert read(tmp_path, json, "run.json") == read(tmp_path, json) == read(tmp_path, "r: 8\nsites: [q_proj]\nalpha: 10.0")
    assert read(tmp_path, "") == read(tmp_path, "# nothing") == {}
    assert read(tmp_path, "{r: 8}") == {"r": 8}, "YAML's flow style begins with a brace too"
    assert read(tmp_path, "b: &b {x: 1}\nc:\n  <<: *b\n  y: 2")["c"] == {"x": 1, "y": 2}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)  # fmt: skip
WRONG: list[tuple[str | bytes, str, str]] = [
    ("- 1\n- 2", "run.yaml", "holds a list; expected keys and values"),
    ("only words", "run.yaml", "holds a text; expected"),
    ("[1, 2]", "run.json", "holds a list"),
    ("a: 1\nb: 2\na: 3", "run.yaml", "line 3, column 1: 'a' is given twice"),
    ("a:\n  b: 1\n  b: 2", "run.yaml", "line 3, column 3: 'b' is given twice"),
    ('{"a": 1,\n "a": 2}', "run.json", "line 2, column 2: 'a' is given twice"),
    ("a: .nan", "run.yaml", "a is nan"),
    ("a: {b: [1, -.inf]}", "run.yaml", r"a.b\[2\] is -inf"),
    ('{"a": NaN}', "run.json", "a is nan"),
    ("a: 1e999", "run.yaml", "a is inf"),
    ("a:\n\tb: 1", "run.yaml", "line 2, column 1: is indented with a tab"),
    ("a: [1", "run.yaml", "line 2, column 1: no YAML"),
    ("a: 1\n---\nb: 2", "run.yaml", "line 2, column 1: no YAML"),
    ('{"a": 1,\n "b" 2}', "run.json", "line 2, column 6: no JSON"),
    (b"\x00\x01PK", "run.yaml", "is a binary file"),
    (b"a: \xff", "run.yaml", "is not UTF-8"),
    ("1: 2", "run.yaml", "the key '1' is no text"),
    ("? [1, 2]\n: 3", "run.yaml", "is no text"),
    ("a: &x [*x]", "run.yaml", "an alias holds itself"),
    (BOMB, "run.yaml", "once its aliases are written out"),
    ("[" * 400_000, "run.yaml", "nested too deeply"),
    ("[" * 400_000, "run.json", "nested too deeply"),
    ("a: " + "{b: " * DEEPEST + "1" + "}" * DEEPEST, "run.yaml", "nested too deeply"),
    ("a: " + "9" * 5000, "run.yaml", "no YAML: Exceeds the limit"),
    ("a: !!python/object/apply:os.system [ls]", "run.yaml", "could not determine a constructor"),
    ("a: " + "x" * LARGEST, "run.yaml", "bytes; a configuration has at most"),
]


@pytest.mark.parametrize(("content", "name", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_cannot_be_read_is_one_line_with_its_place(tmp_path: Path, content: str | bytes, name: str, message: str) -> None:
    with pytest.raises(BadParameter, match=message) as caught:
        read(tmp_path, content, name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="No such file"):
        read_mapping(tmp_path / "none.yaml")
    with pytest.raises(BadParameter, match="is a folder"):
        read_mapping(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.CSV", "notes.txt"])
def test_data_in_place_of_a_configuration_is_told_its_flag(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadParameter, match=f"is data, no configuration; type --train-data .*{name}"):
        read(tmp_path, '{"text": "a"}\n', name)
