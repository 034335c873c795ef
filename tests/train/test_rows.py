"""The rows of a run: the task that they ask for, several sources in one, preferences as feedback, and what a user is told."""

import json
from collections import Counter

import pytest

from lorakit.core.errors import DataError
from lorakit.data.row import data_hash
from lorakit.data.source import load_rows
from lorakit.train.config import make_config
from lorakit.train.rows import read_rows, read_tasks

PLAIN = [{"text": f"text {i}"} for i in range(40)]
CLASSES = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
TAGS = [{"tokens": ["a", "b"], "tags": [f"t{i % 3}", "t0"], "id": i} for i in range(40)]
PREFERENCES = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}", "kind": i} for i in range(40)]
FEEDBACK = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 3 == 0} for i in range(40)]


def written(folder, rows, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def read(data, **options):
    return read_rows(make_config({"train_data": data, **options}))


@pytest.mark.parametrize(
    ("rows", "task", "labels"),
    [
        (PLAIN, "causal-lm", []),
        (CLASSES, "sequence-classification", [0, 1]),
        (TAGS, "token-classification", ["t0", "t1", "t2"]),
        (PREFERENCES, "dpo", []),
        (FEEDBACK, "kto", []),
    ],
)
def test_the_shape_asks_for_the_task(tmp_path, rows, task, labels):
    found = read(written(tmp_path, rows))
    assert (found.task, found.labels) == (task, labels)
    assert sorted(map(json.dumps, [*found.train, *found.valid])) == sorted(map(json.dumps, rows))
    assert found.notes[0].startswith(f"{tmp_path}/data.jsonl: ")
    assert read(written(tmp_path, rows), task=task).task == task


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        (PLAIN, "dpo", r"task=dpo needs other rows: .*data\.jsonl holds text data; expected \{prompt, chosen, rejected\} rows"),
        (PLAIN, "kto", r"task=kto needs other rows: .* holds text data; expected \{prompt, completion, label: true or false\} or"),
        (PREFERENCES, "causal-lm", "task=causal-lm needs other rows: .* holds preference data; expected text, chat or"),
        (FEEDBACK, "dpo", "task=dpo needs other rows: .* holds feedback data"),
        (CLASSES, "token-classification", "holds classify data; expected {tokens, tags} rows"),
    ],
)
def test_a_task_that_needs_other_rows_says_which(tmp_path, rows, task, message):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, rows), task=task)


def test_preferences_as_feedback_are_two_rows_each(tmp_path):
    found = read(written(tmp_path, PREFERENCES), task="kto")
    assert found.task == "kto"
    assert len(found.train) + len(found.valid) == 80
    first = found.train[0]["kind"]
    assert list(found.train[:2]) == [
        {"prompt": f"p{first}", "completion": f"c{first}", "label": True, "kind": first},
        {"prompt": f"p{first}", "completion": f"r{first}", "label": False, "kind": first},
    ]
    assert Counter(row["label"] for row in found.valid) == {True: len(found.valid) // 2, False: len(found.valid) // 2}
    assert {row["kind"] for row in found.train}.isdisjoint(row["kind"] for row in found.valid)


def test_the_fraction_held_out_and_the_first_rows_are_the_configurations(tmp_path):
    data = written(tmp_path, PLAIN)
    assert len(read(data, eval_fraction=0.5).valid) > len(read(data).valid)
    found = read(data, max_train_samples=3, max_eval_samples=1)
    assert (len(found.train), len(found.valid)) == (3, 1)
    assert found.train == load_rows(data, "train")[:3]


def test_sources_with_weights_are_one_whose_sides_are_the_sources_own(tmp_path):
    a, b = written(tmp_path, PLAIN, "a.jsonl"), written(tmp_path, [{"text": f"other {i}"} for i in range(20)], "b.jsonl")
    found = read({a: 0.5, b: 2})
    train = {name: load_rows(name, "train") for name in (a, b)}
    counts = Counter(row["text"] for row in found.train)
    assert sum(counts.values()) == round(len(train[a]) / 2) + 2 * len(train[b])
    assert {counts[row["text"]] for row in train[b]} == {2}
    assert set(counts) <= {row["text"] for name in train for row in train[name]}
    assert list(found.valid) == [*load_rows(a, "valid"), *load_rows(b, "valid")], "held-out rows are not weighted"
    assert found.notes[-2].startswith(f"{a}: {len(train[a])} rows x 0.5 -> ")
    assert found.notes[-1].startswith(f"{b}: {len(train[b])} rows x 2 -> {2 * len(train[b])} rows, ")
    under = read({a: 1, b: 1}, mix_strategy="under")
    assert len(under.train) == 2 * len(train[b])
    assert data_hash(found.train) == data_hash(read({a: 0.5, b: 2}).train)


def test_sources_with_weights_judged_by_one(tmp_path):
    a, b = written(tmp_path, PLAIN[:30], "a.jsonl"), written(tmp_path, PLAIN[30:], "b.jsonl")
    held = written(tmp_path, [{"text": "held"}], "c.jsonl")
    found = read({a: 1, b: 1}, eval_data=held)
    assert (len(found.train), list(found.valid)) == (40, [{"text": "held"}])


def test_sources_of_different_shapes_are_mixed_formats(tmp_path):
    a, b = written(tmp_path, PLAIN, "a.jsonl"), written(tmp_path, CLASSES, "b.jsonl")
    with pytest.raises(DataError, match=r"mixed formats: .*a\.jsonl holds text data and .*b\.jsonl classify data; expected one shape"):
        read({a: 1, b: 1})


def test_sources_of_different_formats_may_be_of_one_shape(tmp_path):
    alpaca = [{"instruction": f"i{i}", "output": "o"} for i in range(20)]
    shared = [{"conversations": [{"from": "human", "value": f"h{i}"}, {"from": "gpt", "value": "g"}]} for i in range(20)]
    found = read({written(tmp_path, alpaca, "a.jsonl"): 1, written(tmp_path, shared, "b.jsonl"): 1})
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in found.train)
    assert [note.split(": ")[1] for note in found.notes[:2]] == ["alpaca", "sharegpt"]


def test_bad_rows_are_left_out_where_the_configuration_says_so(tmp_path):
    data = written(tmp_path, [*PLAIN, {"text": ""}, {"text": 3}])
    with pytest.raises(DataError, match="line 41: 'text' is empty"):
        read(data)
    found = read(data, skip_bad=True)
    assert len(found.train) + len(found.valid) == 40
    assert [one.reason for one in found.skipped] == ["empty text", "an integer for a string"]


def test_columns_and_the_format_are_the_configurations(tmp_path):
    data = written(tmp_path, [{"q": f"{i}", "a": "b"} for i in range(20)])
    assert read(data, columns={"prompt": "q", "completion": "a"}).train[0].keys() == {"prompt", "completion"}
    with pytest.raises(DataError, match="has no columns of alpaca data"):
        read(data, data_format="alpaca")


@pytest.mark.parametrize("rows", [[{**row, "label": 1} for row in CLASSES], [{**row, "tags": ["x", "x"]} for row in TAGS]])
def test_labels_without_variety_are_an_error(tmp_path, rows):
    with pytest.raises(DataError, match=r"every row has the label .*; expected at least two classes to tell apart"):
        read_tasks(make_config({"train_data": written(tmp_path, rows)}))


def test_tasks_in_sequence_share_their_labels_and_their_kind(tmp_path):
    a, b = written(tmp_path, [{**row, "label": "a"} for row in CLASSES], "a.jsonl"), written(tmp_path, CLASSES, "b.jsonl")
    assert [rows.labels for rows in read_tasks(make_config({"train_data": (a, b)}))] == [[0, 1, "a"]] * 2
    with pytest.raises(DataError, match="must be of one kind; found sequence-classification, causal-lm"):
        read_tasks(make_config({"train_data": (a, written(tmp_path, PLAIN, "c.jsonl"))}))


def test_no_data_says_what_to_give():
    with pytest.raises(DataError, match="no training data: give train_data"):
        read_rows(make_config({}))


def test_rows_that_are_held_out_and_trained_on_are_said_to_be(tmp_path):
    data, other = written(tmp_path, PLAIN), written(tmp_path, [PLAIN[0], *({"text": f"other {i}"} for i in range(39))], "other.jsonl")
    assert [note for note in read(data, eval_data=data).notes if "nothing is held out" in note]
    for rows in (read(data), read(data, eval_data=other), read("builtin:tkinter/chat", eval_data="builtin:tkinter/chat")):
        assert not [note for note in rows.notes if "nothing is held out" in note]
