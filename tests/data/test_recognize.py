"""Known formats become our shapes, each with its reason; two that fit, and names that are not there, are errors that say what to type."""

import json
import pickle

import pytest

from lorakit.core.errors import DataError
from lorakit.data.recognize import FORMATS, check_columns, recognize
from lorakit.data.records import Held
from lorakit.data.row import BadRow, shape_of

U, A, S = ({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("system", "be")))
NO = {"role": "assistant", "content": "no"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def read(*rows, **options):
    form = recognize(rows[0], "row 1", **options)
    records = Held(rows, "f,")
    made = [pickle.loads(pickle.dumps(form)).row(records, i) for i in range(len(rows))]
    assert all(shape_of(row) == form.shape for row in made)
    return form, made[0] if len(made) == 1 else made


def fv(*turns):
    return [{"from": who, "value": text} for who, text in turns]


CASES = {
    "alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, {"messages": [U, A]}),
    "alpaca with input": ({"instruction": "a", "input": "b", "output": "yo"}, {"messages": [{"role": "user", "content": "a\nb"}, A]}),
    "alpaca whole": (
        {"system": "be", "history": [["hi", "yo"]], "instruction": "hi", "input": None, "output": "yo"},
        {"messages": [S, U, A, U, A]},
    ),
    "dolly": ({"instruction": "hi", "context": "", "response": "yo", "category": "qa"}, {"messages": [U, A]}),
    "sharegpt": ({"conversations": fv(("system", "be"), ("human", "hi"), ("gpt", "yo")), "id": 3}, {"messages": [S, U, A]}),
    "sharegpt with a system column": ({"conversations": fv(("human", "hi"), ("gpt", "yo")), "system": "be"}, {"messages": [S, U, A]}),
    "sharegpt tools": (
        {
            "conversation": fv(
                ("user", "hi"), ("function_call", '{"name": "f", "arguments": {"a": 1}}'), ("observation", "1"), ("model", "yo")
            ),
            "tools": '[{"name": "f", "parameters": {}}]',
        },
        {
            "messages": [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, A],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
    ),
    "sharegpt calls that are no JSON": (
        {"conversation": fv(("user", "hi"), ("function_call", "f()"), ("observation", "1"), ("model", "yo")), "tools": "[]"},
        {"messages": [U, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "1"}, A], "tools": []},
    ),
    "sharegpt as messages": ({"messages": fv(("human", "hi"), ("gpt", "yo")), "id": 1}, {"messages": [U, A], "id": 1}),
    "conversations of roles": ({"conversations": [U, A]}, {"messages": [U, A]}),
    "openai": ({"messages": [U, A], "id": 1}, {"messages": [U, A], "id": 1}),
    "openai parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, A]},
        {"messages": [U, A]},
    ),
    "openai tools": (
        {
            "messages": [
                U,
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": None}}, "strict": None}],
        },
        {
            "messages": [U, {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "1"}]}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
    ),
    "tools of a preference": (
        {"prompt": [U], "chosen": [A], "rejected": [NO], "tools": [{"name": "f"}]},
        {"prompt": [U], "chosen": [A], "rejected": [NO], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "openai weight": (
        {"messages": [U, {**A, "weight": 0}, U, {**A, "weight": 1}]},
        {"messages": [U, {**A, "train": False}, U, {**A, "train": True}]},
    ),
    "pair": ({"prompt": "hi", "completion": "yo", "label": 3}, {"prompt": "hi", "completion": "yo", "label": 3}),
    "question and answer": ({"question": "hi", "answer": "yo", "id": 1}, {"prompt": "hi", "completion": "yo"}),
    "input and output": ({"input": "hi", "output": "yo", "kind": 2}, {"prompt": "hi", "completion": "yo", "kind": 2}),
    "instruction and response": ({"instruction": "hi", "response": "yo"}, {"prompt": "hi", "completion": "yo"}),
    "orca": ({"system_prompt": "be", "question": "hi", "response": "yo"}, {"messages": [S, U, A]}),
    "trl": ({"prompt": [S, U], "completion": [A]}, {"messages": [{**S, "train": False}, {**U, "train": False}, A]}),
    "preference": ({"prompt": "hi", "chosen": "yo", "rejected": "no"},) * 2,
    "preference of messages": ({"prompt": [U], "chosen": [A], "rejected": [NO]},) * 2,
    "preference with its prompt twice": (
        {"prompt": "hi", "chosen": [U, A], "rejected": [U, NO]},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
    ),
    "preference of a text and messages": (
        {"prompt": "hi", "chosen": [A], "rejected": [NO]},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
    ),
    "fields that a table gives every message": (
        {"messages": [U | {"tool_calls": None, "weight": None}, A | {"tool_calls": None, "name": None}]},
        {"messages": [U, A]},
    ),
    "answers that are one message each": (
        {"prompt": [U], "chosen": A, "rejected": NO},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
    ),
    "implicit prompt": ({"chosen": [S, U, A], "rejected": [S, U, NO]}, {"prompt": [S, U], "chosen": [A], "rejected": [NO]}),
    "ranking": (
        {"instruction": "hi", "input": "", "chosen": "yo", "rejected": "no"},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
    ),
    "ranking of turns": (
        {"conversations": fv(("human", "hi")), "chosen": fv(("gpt", "yo"))[0], "rejected": fv(("gpt", "no"))[0]},
        {"prompt": [U], "chosen": [A], "rejected": [NO]},
    ),
    "orca pairs": (
        {"system": "be", "question": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": [S, U], "chosen": [A], "rejected": [NO]},
    ),
    "hh": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yet",
        },
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": " yes", "rejected": " yet"},
    ),
    "feedback": ({"prompt": "hi", "completion": "yo", "label": True},) * 2,
    "feedback as a table has it": (
        {"prompt": "hi", "completion": "yo", "label": "False"},
        {"prompt": "hi", "completion": "yo", "label": False},
    ),
    "feedback under other names": (
        {"question": "hi", "answer": "yo", "label": True},
        {"prompt": "hi", "completion": "yo", "label": True},
    ),
    "kto_tag": (
        {"instruction": "hi", "input": "", "output": "yo", "kto_tag": True},
        {"prompt": [U], "completion": [A], "label": True},
    ),
    "kto_tag of messages": ({"messages": [U, A], "kto_tag": False}, {"prompt": [U], "completion": [A], "label": False}),
    "classify": ({"text": "a", "label": 1, "idx": 7},) * 2,
    "sentence": ({"sentence": "a", "label": 1, "idx": 7}, {"text": "a", "label": 1}),
    "review": ({"review": "a", "category": "x"}, {"text": "a", "label": "x"}),
    "tag": ({"tokens": ["a", "b"], "tags": [0, 1]},) * 2,
    "conll": ({"id": "0", "tokens": ["a", "b"], "pos_tags": [3, 4], "ner_tags": [0, 1]}, {"tokens": ["a", "b"], "tags": [0, 1]}),
    "tag as a table has it": ({"tokens": '["a"]', "tags": "[0]"}, {"tokens": ["a"], "tags": [0]}),
    "text": ({"text": "a", "id": 3, "title": "t"},) * 2,
    "content": ({"content": "a", "title": "t"}, {"text": "a"}),
    "empty columns are not there": ({"text": None, "messages": [U, A]}, {"messages": [U, A]}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_known_format_becomes_our_shape_and_says_why(name):
    given, expected = CASES[name]
    form, made = read(given)
    assert made == expected
    reason = form.reason(given)
    assert reason.startswith(f"{form.name}: column")
    assert "\n" not in reason
    for used in form.uses:
        assert used in reason
    unused = [key for key in given if key not in (*form.uses, "kind", "tools")]
    assert ("not used: " in reason) == bool(unused)
    assert form.asked in FORMATS
    assert read(given, data_format=form.asked)[1] == expected, "what is asked for by its own name is the same"


def test_rows_in_our_shapes_are_the_same_objects():
    for row in ({"text": "a"}, {"messages": [U, A], "tools": []}, {"prompt": "", "completion": "b", "x": None}, {"text": "a", "label": 1}):
        assert recognize(row, "row 1").row(Held([row], "f,"), 0) is row


def test_the_reason_of_alpaca():
    row = {"instruction": "a", "input": "b", "output": "c", "id": 1}
    assert recognize(row, "").reason(row) == (
        "alpaca: columns instruction, input, output; instruction and input become the user's message, output the assistant's; not used: id"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": "b", "text": "c"}, "data_format=text or data_format=alpaca"),
        ({"text": "a", "category": "b"}, "data_format=text or data_format=classify"),
        ({"text": "a", "summary": "b"}, "data_format=text or data_format=pair"),
        ({"text": "a", "messages": [U]}, "keys of two kinds.*data_format=chat or data_format=text"),
        ({"prompt": "a", "chosen": [U, A], "rejected": [U, NO], "messages": [U]}, "data_format=chat or data_format=preference"),
        ({"question": "a", "answer": "b", "response": "c"}, r"say which with columns=\{prompt: question, completion: answer\}"),
        ({"sentence": "a", "review": "b", "label": 1}, r"columns=\{text: sentence, label: label\}"),
    ],
)
def test_two_formats_that_fit_are_an_error_that_says_what_to_type(row, message):
    with pytest.raises(BadRow, match=message):
        recognize(row, "row 1")


def test_what_it_says_to_type_settles_it():
    row = {"instruction": "hi", "input": "", "output": "yo", "text": "hi yo"}
    assert read(row, data_format="alpaca")[1] == {"messages": [U, A]}
    assert read(row, data_format="text")[1] == row
    row = {"prompt": "hi", "chosen": [U, A], "rejected": [U, NO], "messages": [U, A]}
    assert read(row, data_format="preference")[1] == {"prompt": [U], "chosen": [A], "rejected": [NO]}
    assert read({"question": "a", "answer": "b", "response": "c"}, columns={"prompt": "question", "completion": "answer"})[1] == {
        "prompt": "a", "completion": "b", "response": "c",
    }  # fmt: skip


def test_columns_give_our_names_to_the_files():
    talk = {"dialog": [{"who": "human", "says": "hi"}, {"who": "gpt", "says": "yo"}]}
    columns = {"conversations": "dialog", "role": "who", "content": "says"}
    assert read(talk, columns=columns)[1] == {"messages": [U, A]}
    form, made = read({"q": "hi", "a": "yo", "text": "b"}, columns={"prompt": "q", "completion": "a"})
    assert made == {"prompt": "hi", "completion": "yo"}
    assert form.reason({"q": "hi", "a": "yo", "text": "b"}) == "pair: columns q as prompt, a as completion; not used: text"
    swapped = {"text": "the label", "label": "the text"}
    assert read(swapped, columns={"text": "label", "label": "text"})[1] == {"text": "the text", "label": "the label"}
    more = {"q": "a", "input": "b", "output": "yo"}
    assert read(more, columns={"instruction": "q", "output": "output"})[1] == {"messages": [{"role": "user", "content": "a\nb"}, A]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "qestion"}, "row 1 has no 'qestion', but {answer, question}. Did you mean 'question'?"),
        ({"promt": "question"}, "'promt' is no name of ours. Did you mean 'prompt'?"),
        ({"question": "prompt"}, "'question' is no name of ours. Ours stand on the left: {prompt: question}"),
        ({"role": "from"}, "row 1 has no 'from', but {}."),
    ],
)
def test_a_column_that_is_not_there_is_answered_with_the_nearest(columns, message):
    with pytest.raises(DataError) as error:
        check_columns(columns, {"question": "a", "answer": "b"}, "row 1")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message", "reason"),
    [
        ([{"conversations": fv(("humn", "a"))}], "message 1 of 'conversations' is from 'humn'; known roles: user, human", "unknown role"),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], "part of type 'image_url'; only text", "no text"),
        ([{"instruction": "a", "output": ""}], "'output' is empty", "empty text"),
        ([{"instruction": "", "input": "", "output": "b"}], "'instruction' is empty", "empty text"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "text": "b"}], "has no 'output', but {instruction", "other keys"),
        ([{"instruction": "a", "output": 3}], "'output' is an integer; expected a string", "an integer for a string"),
        ([{"instruction": "a", "output": "b", "history": [["x"]]}], "turn 1 of 'history' is a list", "history"),
        ([{"question": "a", "answer": ""}], "'completion' is empty", "empty text"),
        ([{"chosen": [U, A], "rejected": [S, NO]}], "begin with different messages", "no common prompt"),
        ([{"chosen": "a", "rejected": "b"}], "no common beginning with 'Assistant:'", "no common prompt"),
        ([{"instruction": "a", "output": "b", "kto_tag": "maybe"}], "'kto_tag' is a string; expected true or false", "true or false"),
        ([{"messages": [U], "kto_tag": True}], "does not end with an answer", "no answer"),
        ([{"tokens": ["a"], "ner_tags": "x"}], "'ner_tags' is a string; expected a list", "for a list"),
        ([{"tokens": ["a", "b"], "ner_tags": [1]}], "2 tokens and 1 tags", "not one tag a token"),
        ([{"conversations": fv(("human", "a")), "chosen": {}, "rejected": {}}, {"conversations": []}], "empty list", "empty list"),
        ([{"promt": "a", "completion": "b"}], "Did you mean 'prompt'? (found 'promt')", "no known set of keys"),
        ([{}], "no known set of keys: {}", "no known set of keys"),
        (
            [{"prompt": [U], "chosen": [A], "rejected": [NO]}, {"prompt": [], "chosen": [A], "rejected": [NO]}],
            "'prompt' is an empty list", "an empty list for messages",
        ),
    ],
)  # fmt: skip
def test_a_bad_row_names_the_field_and_what_was_expected(rows, message, reason):
    with pytest.raises(BadRow) as error:
        read(*rows)
    assert message in str(error.value)
    assert reason in error.value.reason
    assert "\n" not in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.where, again.reason, again.field) == (
        str(error.value), error.value.where, error.value.reason, error.value.field,
    )  # fmt: skip


def test_names_that_would_break_a_line_are_quoted():
    with pytest.raises(BadRow) as error:
        recognize({"a\nb": 1, "\ud800": 2, "x" * 500: 3}, "row 1")
    assert "\n" not in str(error.value)
    assert json.dumps(str(error.value)).isascii()
    str(error.value).encode()
    assert len(str(error.value)) < 500


def test_columns_that_nobody_knows_are_answered_with_what_to_type():
    with pytest.raises(BadRow, match=r"or map them: --columns '\{text: antwort\}', ours: yours\.$"):
        recognize({"frage": "a", "antwort": "b"}, "row 1")
    with pytest.raises(BadRow, match="your_column"):
        recognize({"a b": "a"}, "row 1")
    with pytest.raises(BadRow, match=r"yours\.$"):
        recognize({"a": 1}, "row 1")


@pytest.mark.parametrize(("row", "said"), [
    ({"messages": [U, A], "tools": ["f"]}, r"tool 1 is a string; expected \{type: function"),
    ({"messages": [U, A], "tools": [{"name": "f"}, {"type": "function"}]}, r"tool 2 is \{type\}; expected"),
    ({"messages": [U, A], "tools": "f, g"}, r"'tools' is a string; expected a list"),
    ({"messages": [U, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, r"message 2 of 'messages' has a tool call .* without a name"),
])  # fmt: skip
def test_tools_without_a_name_are_refused(row, said):
    with pytest.raises(BadRow, match=said):
        read(row)


def test_the_reason_says_where_tools_go():
    form, _ = read({"messages": [U, A], "tools": [{"name": "f"}], "id": 1})
    assert (
        form.reason({"messages": [U, A], "tools": [{"name": "f"}], "id": 1})
        == "chat: column messages; tools go to the chat template; not used: id"
    )


def test_tools_beside_texts_are_not_used_and_not_read():
    row = {"prompt": "hi", "chosen": "yo", "rejected": "no", "tools": "f, g"}
    form, made = read(row)
    assert made == row
    assert form.reason(row).endswith("; not used: tools")
