"""Whatever a file holds, the readers answer with rows of a known shape or with one line, soon."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.recognize import FORMATS, OURS
from lorakit.data.row import data_hash, shape_of
from lorakit.data.source import Reading, load_source

SOON = timedelta(seconds=2)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.integers(10**30, 10**40)
others = ["question", "answer", "from", "value", "train", "weight", "tool_calls", "content"]
keys = st.sampled_from([*sorted(OURS), *others]) | st.text(max_size=3)
messages = st.lists(
    st.fixed_dictionaries({}, optional={
        "role": st.sampled_from(["user", "assistant", "system", "x", ""]) | scalars, "content": scalars | st.lists(scalars, max_size=2),
        "from": st.sampled_from(["human", "gpt", "x"]) | scalars, "value": scalars, "train": scalars, "weight": scalars,
    }), max_size=3,
)  # fmt: skip
deeper = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)  # noqa: E731
values = st.recursive(scalars | messages, deeper, max_leaves=8)
objects = st.dictionaries(keys, values, max_size=6)
readings = st.builds(
    Reading, st.sampled_from(["auto", "auto", *FORMATS]), st.just({}) | st.dictionaries(keys, keys, max_size=2), st.booleans()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def answers(path: Path, reading: Reading) -> None:
    """Rows of one shape that can be hashed, or one line."""
    try:
        found = load_source(path, valid_fraction=0.5, reading=reading)
    except DataError as error:
        lines = str(error).encode().count(b"\n")
        found = None
    if found is None:
        assert lines == 0
        return
    rows = [*found.train, *found.valid]
    assert {shape_of(row) for row in rows} == {found.shape}
    assert len(found.train)
    assert len(found.valid)
    assert all("\n" not in note for note in found.notes)
    data_hash(rows)
    json.dumps([row.get("kind") for row in rows])


@settings(deadline=SOON, max_examples=200)
@given(st.lists(objects, min_size=1, max_size=4), readings)
@example([{"messages": [{"from": None, "value": "a"}]}] * 2, Reading())
def test_any_objects(folder, rows, reading):
    text = "\n".join(json.dumps(row) for row in rows)
    for name, content in (("a.jsonl", text), ("a.json", json.dumps(rows))):
        (folder / name).write_text(content)
        answers(folder / name, reading)


@settings(deadline=SOON, max_examples=150)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\n\\ atexlbu01-e', max_size=60).map(str.encode), readings)
def test_any_bytes(folder, content, reading):
    for name in ("b.jsonl", "b.json", "b.csv", "b.tsv", "b.txt", "b.parquet", "b.arrow"):
        (folder / name).write_bytes(content)
        answers(folder / name, reading)


@settings(deadline=SOON, max_examples=150)
@given(st.lists(st.lists(st.text(max_size=5), max_size=4), max_size=5), st.sampled_from([",", ";", "\t"]), readings)
@example([["text", "label"], ['"', "a"], ["b\r", "c"]], ",", Reading(skip_bad=True))
def test_any_table_of_text(folder, rows, delimiter, reading):
    text = "text,label\n" + "\n".join(delimiter.join(row) for row in rows)
    for content in (text, text.partition("\n")[2]):
        (folder / "c.csv").write_bytes(content.encode(errors="surrogatepass"))
        answers(folder / "c.csv", reading)


@settings(deadline=SOON, max_examples=100)
@given(st.data())
def test_a_table_with_some_bytes_changed(folder, data):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"row {i}" for i in range(20)], "label": list(range(20))})
    for name in ("d.parquet", "d.arrow"):
        path = folder / name
        if name == "d.parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.unlink()  # the old file is still mapped
        path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
        answers(path, Reading(skip_bad=data.draw(st.booleans())))
