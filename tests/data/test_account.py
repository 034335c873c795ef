"""What is said of tokenizing: the rules with their counts, and notes where something looks wrong."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.account import Account, Counts, account_of
from lorakit.data.tiny import tiny_tokenizer
from lorakit.data.tokenize import tokenize_rows

TOKENIZER = tiny_tokenizer()
FINE = Counts(rows=10, samples=10, tokens=1000, trained=400, n_bytes=9, appended=10, closed=10, largest=99)
counts = st.builds(Counts, *(st.integers(0, 9) for _ in range(17)), named=st.lists(st.text(max_size=3), max_size=3).map(tuple))


def account(shape="chat", **changes):
    return account_of(TOKENIZER, replace(FINE, **changes), shape, 64)


@given(counts, counts, counts)
def test_counts_of_parts_are_those_of_the_whole(a, b, c):
    assert (a + b) + c == a + (b + c)
    assert a + Counts() == a == Counts() + a
    assert (a + b).largest == max(a.largest, b.largest)
    assert all(getattr(a + b, f.name) == getattr(a, f.name) + getattr(b, f.name) for f in fields(a) if f.name not in ("largest", "named"))
    assert len((a + b + c).named) <= 5


def test_the_rules_are_said_with_their_counts():
    rows = [{"text": "the thing"}, {"text": "a" * 30}, {"text": "b<eos>"}, {"text": "<eos>"}]
    said = "\n".join(tokenize_rows(TOKENIZER, rows, max_length=16).account.lines())
    assert said == (
        "tokens      39 in 4 samples; trained on 35 (89.7 %)\n"
        "EOS         <eos> appended to 2 of 4 texts, 2 had it already; it is trained on\n"
        "BOS         none is added\n"
        "chunks      1 texts longer than max_length=16 became several samples; no token is lost\n"
        "dropped     1 rows without a trained token within the limit (1 had none at all)\n"
        "padding     on the right, with <pad>, never trained on"
    )


def test_an_eos_that_is_cut_off_again_is_not_claimed():
    rows = [{"prompt": "the ", "completion": "thing"}, {"prompt": "the ", "completion": "a" * 30}]
    said = tokenize_rows(TOKENIZER, rows, max_length=16).account.lines()[1]
    assert said == "EOS         <eos> appended to 2 of 2 completions; it is trained on, unless max_length cuts it off, as in 1"


def test_padding_with_eos_is_explained():
    same = tiny_tokenizer()
    same.pad_token = same.eos_token
    said = account_of(same, FINE, "pair", 64).lines()
    assert said[-1].endswith("with <eos>, never trained on; it is EOS as well, but padding is told apart by its place, so EOS is learned")


def test_packing_says_how_full_the_windows_are():
    lines = replace(account(), windows=20).lines()
    assert "packing     20 windows of 64, 78.1 % full; no document sees another" in lines


def test_nothing_is_noted_where_nothing_is_wrong():
    assert account().notes() == account("pair").notes() == account("text").notes() == account("classify", trained=0).notes() == []


@pytest.mark.parametrize(("changes", "said"), [
    ({"closed": 7}, "in 3 of 10 chats no learned turn is closed by <eos> or another special token"),
    ({"closed": 8, "untaught": 2}, "2 of 10 rows have no token to learn; check the roles and 'train' of their messages, and train_on"),
    ({"truncated": 4, "dropped": 2}, "6 of 10 rows are longer than max_length=64, and lose their ends; raise it"),
    ({"unknown": 11}, "1.1 % of the tokens are <unk>"),
    ({"twice": 1, "bos": 1}, "1 of 10 rows begin with <bos> twice: the text spells out the one that the tokenizer adds"),
])  # fmt: skip
def test_what_looks_wrong_is_noted_alone(changes, said):
    (note,) = account(**changes).notes()
    assert note.startswith(said)


def test_a_limit_just_met_is_no_note():
    assert account(truncated=5).notes() == account(unknown=10).notes() == []


def test_an_account_needs_no_special_tokens():
    bare = Account(FINE, "chat", 64, "", "", "", "")
    assert "BOS         the tokenizer has none" in bare.lines()
