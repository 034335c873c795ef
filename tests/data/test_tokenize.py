import json
from functools import cache
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from lorakit.core.errors import DataError
from lorakit.data.chat import Chats, encode_chat
from lorakit.data.encoded import Encoded, encode_pair, encode_text, token_ids
from lorakit.data.lazy import Chain, place_of
from lorakit.data.source import load_rows
from lorakit.data.tiny import tiny_tokenizer
from lorakit.data.tokenize import chunks, class_names, tokenize_classes, tokenize_rows, trained_bytes
from lorakit.data.tokenized import ROWS_A_WORKER, How, _ends
from lorakit.train.source_model import load_tokenizer

TOKENIZER = tiny_tokenizer()


def pairs(*texts):
    return [{"prompt": p, "completion": c} for p, c in texts]


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


# ------------------------------------------------------------------------------------------------------------- many texts at once
texts = st.lists(st.text(alphabet="ab th\n  é中🙂def<eos>", min_size=1, max_size=30), min_size=1, max_size=5)
FRAMED = tiny_tokenizer()
FRAMED.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])


@given(texts, st.sampled_from(["tiny", "framed", "bundled", "bytes"]))
def test_a_text_s_tokens_do_not_depend_on_its_neighbors(words, name):
    """Against the tokenizer called with one text, as before there were batches."""
    tokenizer = tokenizers()[name]
    alone = [list(tokenizer(text, add_special_tokens=special).input_ids) for special in (True, False) for text in words]
    assert [*token_ids(tokenizer, words, special=True), *token_ids(tokenizer, words, special=False)] == alone
    rows = [{"text": text} for text in words] + [{"text": "ab"}]
    one_by_one = [s for row in rows for s in samples_of(tokenizer, [row])]
    assert list(tokenize_rows(tokenizer, rows, max_length=8).samples) == one_by_one


def samples_of(tokenizer, rows):
    try:
        return tokenize_rows(tokenizer, rows, max_length=8).samples
    except DataError:  # a text of one token
        return []


@cache
def tokenizers():
    return {"tiny": TOKENIZER, "framed": FRAMED, "bundled": load_tokenizer("bundled"), "bytes": ByT5Tokenizer()}


@given(st.lists(st.lists(st.text(alphabet="ab th\né🙂", max_size=9), min_size=2, max_size=5), min_size=1, max_size=4))
def test_a_chat_s_tokens_do_not_depend_on_its_neighbors(contents):
    chats = [[{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(one)] for one in contents]
    assert Chats(TOKENIZER).encode(chats) == [encode_chat(TOKENIZER, one) for one in chats]


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_how_many_rows_are_taken_at_once_changes_nothing(monkeypatch, batch):
    rows = [{"text": "the thing " * (1 + 7 * i % 11), "kind": i % 2} for i in range(20)]
    whole = tokenize_rows(TOKENIZER, rows, max_length=16)
    monkeypatch.setattr("lorakit.data.tokenized.BATCH", batch)
    monkeypatch.setattr("lorakit.data.tokenized.CHARACTERS", 40)
    parts = tokenize_rows(TOKENIZER, rows, max_length=16)
    assert list(parts.samples) == list(whole.samples)
    assert parts.account == whole.account


def test_parts_are_short_in_characters():
    rows = [{"text": "a" * n} for n in (30, 30, 30, 100, 5)] + [{"messages": [{"role": "user", "content": "b" * 90}]}]
    assert list(_ends(rows)) == [6]
    with mock.patch("lorakit.data.tokenized.CHARACTERS", 64):
        assert list(_ends(rows)) == [2, 3, 4, 5, 6]


# --------------------------------------------------------------------------------------------------------------- rows that are wrong
def test_a_row_that_cannot_be_tokenized_is_named_or_left_out_and_counted():
    rows = [{"messages": [{"role": r, "content": "a"} for r in roles]} for roles in (["user", "assistant"], ["user"], ["assistant"])]
    with pytest.raises(DataError, match=r"^row 2: the conversation has no assistant message.*; skip_bad .--skip-bad. leaves such rows out"):
        tokenize_rows(TOKENIZER, rows, max_length=32)
    with mock.patch("lorakit.data.tokenized.CHARACTERS", 1), pytest.raises(DataError, match=r"^row 2: "):
        tokenize_rows(TOKENIZER, rows, max_length=32)
    with mock.patch("lorakit.data.tokenized.BATCH", 1), pytest.raises(DataError, match=r"^row 2: "):
        tokenize_rows(TOKENIZER, rows, max_length=32)
    done = tokenize_rows(TOKENIZER, rows, max_length=32, skip_bad=True)
    good = tokenize_rows(TOKENIZER, rows[::2], max_length=32)
    assert list(done.samples) == list(good.samples)
    assert (done.rows, done.bad) == (3, 1)
    assert str(done) == "2 samples from 3 rows (1 left out as bad)"
    assert "left out    1 rows: row 2: the conversation has no assistant" in "\n".join(done.account.lines())


def test_a_row_of_a_file_is_named_by_its_line(tmp_path):
    good, bad = ([{"role": role, "content": "a"}] for role in ("assistant", "user"))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in [*[good] * 3, bad]))
    rows = load_rows(str(tmp_path / "d.jsonl"), "valid", valid=str(tmp_path / "d.jsonl"), seed=0)
    with pytest.raises(DataError, match=r"d\.jsonl, line 4: the conversation has no assistant"):
        tokenize_rows(TOKENIZER, rows, max_length=32)
    assert place_of(Chain([rows, rows])[2:], 5).endswith("d.jsonl, line 4")
    assert place_of([{}] * 3, 2) == "row 3"


# ---------------------------------------------------------------------------------------------------------------- what is learned
def test_a_pair_s_prompt_is_learned_on_request():
    rows = pairs(("ab", "xyz"))
    learned = tokenize_rows(TOKENIZER, rows, max_length=8, train_on="all").samples[0]
    assert learned.labels == learned.input_ids == tokenize_rows(TOKENIZER, rows, max_length=8).samples[0].input_ids
    for other in ("assistant", "last"):
        assert tokenize_rows(TOKENIZER, rows, max_length=8, train_on=other).samples[0] == encode_pair(TOKENIZER, "ab", "xyz")


def test_what_was_done_is_counted_by_row_and_token():
    rows = pairs(("ab", "xyz"), ("ab", "xyz" * 9), ("ab" * 9, "xyz"), ("a", "é<eos>"))
    done = tokenize_rows(TOKENIZER, rows, max_length=8)
    c = done.account.counts
    samples = list(done.samples)
    assert (c.rows, c.samples, c.truncated, c.dropped, c.chunked, c.bad) == (4, 3, 1, 1, 0, 0)
    assert c.tokens == sum(len(s.input_ids) for s in samples)
    assert c.trained == sum(s.trained for s in samples)
    assert c.cut == len(encode_pair(TOKENIZER, "ab", "xyz" * 9).input_ids) - 8
    assert (c.appended, c.spelled) == (3, 1)
    assert samples[-1].input_ids.count(1) == 1  # the EOS that the completion spells out is not doubled
    assert c.n_bytes == trained_bytes(TOKENIZER, samples, shifted=True) == len("xyz") + len("xyz" * 2) + len("é".encode())
    assert c.largest == max(i for s in samples for i in s.input_ids)
    texts = tokenize_rows(TOKENIZER, [{"text": "a" * 20}, {"text": "b<eos>"}], max_length=8).account.counts
    assert (texts.chunked, texts.samples, texts.appended, texts.spelled) == (1, 4, 1, 1)
    assert texts.trained == texts.tokens - texts.samples  # nothing predicts a sample's first token
    target = tokenize_rows(TOKENIZER, pairs(("ab", "xyz")), max_length=8, encoder_decoder=True).account.counts
    assert (target.tokens, target.trained) == (2 + 4, 4)


def test_bos_and_unknown_tokens_are_counted():
    rows = [{"text": "ab"}, {"text": "<bos>ab"}, {"text": "a<unk><unk>"}]
    plain, framed = (tokenize_rows(t, rows, max_length=16).account.counts for t in (TOKENIZER, FRAMED))
    assert (plain.bos, plain.twice, plain.unknown) == (1, 0, 2)
    assert (framed.bos, framed.twice) == (3, 1)
    classes = [{"text": row["text"], "label": 0} for row in rows]
    assert tokenize_classes(FRAMED, classes, [0], max_length=16).account.counts.twice == 1
    same = tiny_tokenizer()
    same.unk_token = same.eos_token  # GPT-2's way: an EOS is not unknown
    assert not tokenize_rows(same, rows, max_length=16).account.counts.unknown


def test_ends_that_are_learned_are_counted():
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c}]} for c in ("b", "<eos>", "c" * 40)]
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert tokenize_rows(TOKENIZER, rows, max_length=64).account.counts.closed == 3
    done = tokenize_rows(TOKENIZER, rows, max_length=64, chat_template=bare)
    assert done.account.counts.closed == 1
    assert "in 2 of 3 chats no learned turn is closed by <eos>" in done.account.notes()[0]


def test_few_rows_are_tokenized_in_one_process():
    assert How().processes(ROWS_A_WORKER - 1) == 1
    assert How(workers=3).processes(1) == 3
    with mock.patch("os.sched_getaffinity", return_value=range(4), create=True):
        assert [How().processes(n * ROWS_A_WORKER) for n in (1, 2, 9)] == [1, 2, 4]
