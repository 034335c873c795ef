import pytest

from lorakit.core.errors import DataError
from lorakit.data.row import check_rows, data_hash, shape_of

SHAPES = {
    "text": {"text": "a"},
    "chat": {"messages": [{"role": "user", "content": "a"}]},
    "pair": {"prompt": "a", "completion": "b"},
    "classify": {"text": "a", "label": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_keys_decide_the_shape_and_other_keys_may_stand_beside(shape):
    assert shape_of(SHAPES[shape]) == shape
    assert shape_of({"id": 3, **SHAPES[shape]}) == shape


def checked(*rows):
    return check_rows((f"line {i}", row) for i, row in enumerate(rows, 1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "id": 1}], r"line 1 has no known set of keys: \{id, prompt\}; expected \{text\}, \{messages\}"),
        ([{"text": "a", "prompt": "a", "completion": "b"}], "line 1 has keys of two kinds"),
        (
            [{"text": "a"}, {"prompt": "a", "completion": "b"}],
            r"line 2 has the keys \{completion, prompt\}, .* text data: expected \{text\}",
        ),
        ([{"text": "a"}, {"text": "a", "label": 1}], "line 2 has the keys"),
        ([{"text": "a", "label": 1}, {"text": "a"}], r"line 2 .* expected \{text, label\}"),
        ([{"text": ""}], "line 1: 'text' is empty"),
        ([{"text": 3}], "line 1: 'text' is an integer; expected a string"),
        ([{"text": "\ud800"}], "surrogate"),
        ([{"text": "a", "label": 0.5}], "'label' is a number"),
        ([{"text": "a", "label": True}], "'label' is true or false"),
        ([{"prompt": "a", "completion": None}], "'completion' is missing"),
        ([{"messages": []}], "'messages' is an empty list"),
        ([{"messages": ["a"]}], "message 1 is a string"),
        ([{"messages": [{"role": "user", "text": "a"}]}], r"message 1 has \{role, text\}; expected \{role, content\}"),
        ([{"messages": [{"role": "user", "content": None}]}], "message 1: 'content' is missing"),
    ],
)
def test_a_bad_row_is_named_in_one_line(rows, message):
    with pytest.raises(DataError, match=message) as error:
        checked(*rows)
    assert "\n" not in str(error.value)


def test_good_rows_come_back_unchanged():
    rows = [{"prompt": "", "completion": "b", "id": 1}, {"completion": "d", "prompt": "c"}]
    assert checked(*rows) == rows


def test_the_hash_sees_content_and_order_but_not_key_order():
    a, b = {"text": "é", "label": 1}, {"label": 1, "text": "é"}
    assert data_hash([a]) == data_hash([b]) == "4af3af6c91535e8f83702581d0675e44d94c5f5d5da751f2b8ddedf116c68f44"
    assert data_hash([a, {"text": "x"}]) != data_hash([{"text": "x"}, a])
    assert data_hash([{"text": "a"}, {"text": "b"}]) != data_hash([{"text": "ab"}])
