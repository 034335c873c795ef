import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.encoded import Encoded, encode_pair, encode_text
from lorakit.data.tiny import tiny_tokenizer
from lorakit.data.tokenize import chunks, class_names, tokenize_classes, tokenize_rows

TOKENIZER = tiny_tokenizer()


def pairs(*texts):
    return [{"prompt": p, "completion": c} for p, c in texts]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40).filter(lambda text: "<" not in text), min_size=1, max_size=6), st.integers(2, 20))
def test_no_token_of_a_text_is_lost_or_left_alone(texts, max_length):
    done = tokenize_rows(TOKENIZER, [{"text": text} for text in texts], max_length=max_length)
    whole = [encode_text(TOKENIZER, text) for text in texts]
    assert [i for s in done.samples for i in s.input_ids] == [i for s in whole for i in s.input_ids]
    assert all(len(s.input_ids) <= max_length and s.labels == s.input_ids for s in done.samples)
    assert max_length == 2 or all(len(s.input_ids) >= 2 for s in done.samples)  # an odd text cannot be cut in twos
    assert done.chunked == sum(len(s.input_ids) > max_length for s in whole)
    assert not done.truncated
    assert not done.dropped


def test_a_text_of_one_token_predicts_nothing():
    done = tokenize_rows(TOKENIZER, [{"text": "<eos>"}, {"text": "a"}], max_length=8)
    assert len(done.samples) == done.dropped == 1
    with pytest.raises(DataError, match="none of the 1 rows has a trained token"):
        tokenize_rows(TOKENIZER, [{"text": "<eos>"}], max_length=8)


def test_chunks_are_full_but_for_the_end():
    sample = Encoded(list(range(9)), list(range(9)))
    assert [len(c.input_ids) for c in chunks(sample, 4)] == [4, 3, 2]
    assert [len(c.input_ids) for c in chunks(sample, 5)] == [5, 4]
    assert [len(c.input_ids) for c in chunks(sample, 9)] == [9]


def test_long_pairs_lose_their_end_and_hopeless_ones_are_dropped_and_counted():
    rows = pairs(("ab", "xyz"), ("ab", "xyz" * 9), ("ab" * 9, "xyz"))
    done = tokenize_rows(TOKENIZER, rows, max_length=8)
    assert done.samples[0] == encode_pair(TOKENIZER, "ab", "xyz")
    assert [len(s.input_ids) for s in done.samples] == [6, 8]
    assert (done.rows, done.truncated, done.dropped) == (3, 1, 1)
    assert str(done) == "2 samples from 3 rows (1 truncated, 1 dropped, no trained token left)"
    assert str(tokenize_rows(TOKENIZER, rows[:1], max_length=8)) == "1 samples from 1 rows"


def test_chats_go_through_the_template_with_its_options():
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * n}]} for n in (1, 30)]
    done = tokenize_rows(TOKENIZER, rows, max_length=12)
    assert (done.truncated, done.dropped, len(done.samples)) == (1, 0, 2)
    assert done.samples[0].trained == 2
    everything = tokenize_rows(TOKENIZER, rows, max_length=12, train_on="all")
    assert everything.samples[0].trained == len(everything.samples[0].input_ids)
    with pytest.raises(DataError, match="no default chat template"):
        tokenize_rows(tiny_tokenizer(chat_template=None), rows, max_length=12)


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(DataError, match="none of the 1 rows has a trained token within max_length=4; raise it"):
        tokenize_rows(TOKENIZER, pairs(("ab" * 9, "x")), max_length=4)
    with pytest.raises(DataError, match="no rows"):
        tokenize_rows(TOKENIZER, [], max_length=4)
    with pytest.raises(DataError, match="max_length is 1; expected at least 2"):
        tokenize_rows(TOKENIZER, [{"text": "a"}], max_length=1)


def test_encoder_decoder_rows_are_pairs_cut_on_both_sides():
    done = tokenize_rows(TOKENIZER, pairs(("ab" * 9, "xyz")), max_length=3, encoder_decoder=True)
    assert len(done.samples[0].input_ids) == len(done.samples[0].labels) == 3
    assert done.truncated == 1
    with pytest.raises(DataError, match=r"these rows are text data; expected \{prompt, completion\} rows"):
        tokenize_rows(TOKENIZER, [{"text": "a"}], max_length=4, encoder_decoder=True)


def test_classes_are_numbered_in_a_fixed_order():
    rows = [{"text": "ab", "label": "y"}, {"text": "c" * 20, "label": "x"}, {"text": "d", "label": 3}, {"text": "d", "label": -1}]
    classes = class_names(rows)
    assert classes == [-1, 3, "x", "y"]
    done = tokenize_classes(TOKENIZER, rows, classes, max_length=8)
    assert [s.label for s in done.samples] == [3, 2, 1, 0]
    assert len(done.samples[1].input_ids) == 8
    assert done.truncated == 1
    with pytest.raises(DataError, match=r"label 'asyncoi' is not among the classes\. Did you mean 'asyncio'"):
        tokenize_classes(TOKENIZER, [{"text": "a", "label": "asyncoi"}], ["asyncio", "xml"], max_length=8)


def test_each_kind_of_row_has_its_own_tokenizing():
    with pytest.raises(DataError, match="these rows are classify data; expected text, chat or pair rows"):
        tokenize_rows(TOKENIZER, [{"text": "a", "label": 1}], max_length=8)
    with pytest.raises(DataError, match=r"these rows are text data; classification needs \{text, label\}"):
        tokenize_classes(TOKENIZER, [{"text": "a"}], [], max_length=8)
