"""Entries: found by content, made once, checked when they are read, and never more than the limit."""

import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from lorakit.core.errors import BadParameter, CheckpointError
from lorakit.data import tokenized
from lorakit.data.account import Counts
from lorakit.data.preference import tokenize_answers
from lorakit.data.row import data_hash
from lorakit.data.samples import Samples
from lorakit.data.tag import tokenize_tags
from lorakit.data.tiny import CHAT_TEMPLATE, tiny_tokenizer
from lorakit.data.token_cache import INDEX, TokenCache, key_of
from lorakit.data.tokenize import tokenize_classes, tokenize_rows
from lorakit.data.tokenized import How, Rules, Tokenizing

TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": f"the {i}", "completion": "thing " * (1 + i % 5), "kind": i % 3} for i in range(40)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "LARGE", 5)
    monkeypatch.setattr(tokenized, "BATCH", 15)  # an entry is made of several parts
    return TokenCache(tmp_path / "tokens", 10**9)


def entries(cache):
    return sorted(f for f in cache.root.iterdir() if f.is_dir())


def made(cache, rows=ROWS, **options):
    return tokenize_rows(TOKENIZER, rows, max_length=12, how=How(cache=cache), **options)


def count_calls(monkeypatch):
    calls = []
    real = Tokenizing.__call__
    monkeypatch.setattr(Tokenizing, "__call__", lambda self, *args: (calls.append(1), real(self, *args))[1])
    return calls


def test_what_is_found_is_what_was_made(cache, monkeypatch):
    calls = count_calls(monkeypatch)
    there, again, here = made(cache), made(cache), made(None)
    assert len(calls) == 6  # three parts of the first, and of the one without a cache
    assert list(there.samples) == list(again.samples) == list(here.samples)
    assert there.account == again.account == here.account
    assert str(again) == str(here)
    assert isinstance(again.samples.ids, np.memmap)
    assert not isinstance(here.samples.ids, np.memmap)


@pytest.mark.parametrize(("rows", "options"), [
    ([{"text": "abc def " * (1 + i % 9)} for i in range(20)], {}),
    (ROWS, {"encoder_decoder": True}),
    ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(20)], {}),
])  # fmt: skip
def test_every_layout_comes_back(cache, rows, options):
    done = [made(one, rows, **options) for one in (None, cache, cache)]
    assert list(done[0].samples) == list(done[1].samples) == list(done[2].samples)
    assert len(entries(cache)) == 1
    labels = (entries(cache)[0] / "labels.npy").exists()
    assert labels == ("text" not in rows[0])  # a text's labels are its ids: not written twice


def test_classes_come_back(cache):
    rows = [{"text": f"a{i}", "label": i % 2} for i in range(20)]
    done = [tokenize_classes(TOKENIZER, rows, [0, 1], max_length=8, how=How(cache=one)) for one in (None, cache, cache)]
    assert list(done[0].samples) == list(done[1].samples) == list(done[2].samples)


SAID = [{"role": "user", "content": "the question"}], [{"role": "assistant", "content": "an answer"}]
COMPARED = {
    "preference": [{"prompt": f"the {i % 3}", "chosen": "thing " * (1 + i % 4), "rejected": f"no {i}", "kind": i % 2} for i in range(40)],
    "feedback": [{"prompt": f"the {i // 2}", "completion": "thing " * (1 + i % 4), "label": i % 3 == 0} for i in range(40)],
    "talks": [{"prompt": SAID[0], "chosen": SAID[1], "rejected": [{"role": "assistant", "content": f"no {i}"}]} for i in range(40)],
}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_answers_come_back(cache, monkeypatch, name, encoder_decoder):
    if name == "talks" and encoder_decoder:
        pytest.skip("an encoder-decoder has no conversations")
    calls = count_calls(monkeypatch)
    options = {"max_length": 60 if name == "talks" else 12, "encoder_decoder": encoder_decoder}
    done = [tokenize_answers(TOKENIZER, COMPARED[name], how=How(cache=one), **options) for one in (None, cache, cache)]
    assert len(calls) == 6
    assert list(done[0].samples) == list(done[1].samples) == list(done[2].samples)
    assert done[0].account == done[1].account == done[2].account
    assert done[0].samples.lengths.tolist() == done[2].samples.lengths.tolist()
    assert done[2].samples[-1] == list(done[0].samples)[-1]
    assert done[2].samples[1:5:2] == list(done[0].samples)[1:5:2]


def test_the_mismatched_answer_may_be_of_another_part(cache):
    rows = COMPARED["feedback"]
    ratings = tokenize_answers(TOKENIZER, rows, max_length=64, how=How(cache=cache)).samples
    said = [TOKENIZER.decode(ratings[i].mismatched.input_ids) for i in (0, 1, 14, 39)]
    assert said == [f"{rows[i]['prompt']}{rows[j]['completion']}<eos>" for i, j in ((0, 2), (1, 2), (14, 16), (39, 0))]


def test_tags_come_back(cache, monkeypatch):
    calls = count_calls(monkeypatch)
    rows = [{"tokens": ["ab", f"c{i}", "d"], "tags": ["x", "O", "x"]} for i in range(40)]
    done = [tokenize_tags(TOKENIZER, rows, ["O", "x"], max_length=6, how=How(cache=one)) for one in (None, cache, cache)]
    assert len(calls) == 6
    assert list(done[0].samples) == list(done[1].samples) == list(done[2].samples)


def test_everything_that_decides_a_bit_is_in_the_key():
    rules, of = Rules("chat", 64), data_hash(ROWS)
    other = tiny_tokenizer()
    other.add_tokens(["zzz"])
    padded = tiny_tokenizer()
    padded.pad_token = "<unk>"
    left = tiny_tokenizer()
    left.truncation_side = "left"
    used = tiny_tokenizer()
    used(["a", "bb"], padding=True, truncation=True, max_length=1)  # leaves its traces in the backend, which change nothing
    keys = [
        key_of(TOKENIZER, rules, of),
        key_of(TOKENIZER, rules, data_hash(ROWS[1:])),
        key_of(TOKENIZER, rules, data_hash(ROWS[::-1])),
        key_of(other, rules, of),
        key_of(padded, rules, of),
        key_of(left, rules, of),
        key_of(tiny_tokenizer(chat_template=CHAT_TEMPLATE + " "), rules, of),
        *(key_of(TOKENIZER, replace(rules, **change), of) for change in (
            {"max_length": 63}, {"train_on": "all"}, {"chat_template": "x"}, {"encoder_decoder": True}, {"shape": "text"},
            {"classes": ("a",)}, {"skip_bad": True},
        )),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of(tiny_tokenizer(), rules, of) == keys[0] == key_of(used, rules, of)


def shorten(folder):
    file = folder / "ids.npy"
    os.truncate(file, file.stat().st_size - 4)


def other_type(folder):
    np.save(folder / "labels.npy", np.load(folder / "labels.npy").astype(np.int64))


def objects(folder):
    np.save(folder / "ids.npy", np.array([{}], dtype=object), allow_pickle=True)


def another_count(folder):
    index = json.loads((folder / INDEX).read_text())
    index["counts"]["rows"] += 1
    (folder / INDEX).write_text(json.dumps(index))


def offsets(folder):
    found = np.load(folder / "offsets.npy")
    found[-1] += 1
    np.save(folder / "offsets.npy", found)


DAMAGES = [
    shorten, other_type, objects, another_count, offsets, lambda f: (f / INDEX).unlink(), lambda f: (f / INDEX).write_text("{"),
    lambda f: (f / "offsets.npy").unlink(), lambda f: (f / "labels.npy").write_bytes(b""),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(cache, monkeypatch, damage):
    whole = list(made(cache).samples)
    damage(entries(cache)[0])
    calls = count_calls(monkeypatch)
    assert list(made(cache).samples) == whole
    assert calls
    calls.clear()
    assert list(made(cache).samples) == whole
    assert not calls
    assert len(entries(cache)) == 1


def test_what_was_used_longest_ago_goes_first(cache):
    made(cache)
    (first,) = entries(cache)
    size = sum(f.stat().st_size for f in first.iterdir())
    small = TokenCache(cache.root, int(2.9 * size))
    made(cache, ROWS[1:])
    for folder in entries(cache):
        age = 1000 if folder == first else 500
        os.utime(folder / INDEX, (time.time() - age,) * 2)
    made(cache)  # the first is used again
    made(small, ROWS[2:])
    assert first in entries(cache)
    assert len(entries(cache)) == 2


def test_an_entry_larger_than_the_limit_is_kept_while_it_is_the_newest(cache):
    tiny = TokenCache(cache.root, 10)
    samples = made(tiny).samples
    assert len(entries(cache)) == 1
    made(tiny, ROWS[1:])
    assert len(entries(cache)) == 1
    assert samples[3].input_ids  # still mapped, though it is gone


def test_nothing_is_left_of_what_failed(cache, monkeypatch):
    def parts():
        yield Samples.of([], "token"), Counts()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.entry(TOKENIZER, Rules("text", 8), "x", parts)
    assert not entries(cache)

    def full():
        raise OSError(28, "No space left on device")
        yield

    with pytest.raises(CheckpointError, match="cannot write tokens to .*: No space left on device; set LORAKIT_CACHE to another folder"):
        cache.entry(TOKENIZER, Rules("text", 8), "x", full)
    assert not entries(cache)


def test_what_a_killed_process_left_is_removed_a_day_later(cache):
    cache.root.mkdir()
    for name, age in ((".partial-old", 90_000), (".partial-new", 100)):
        (cache.root / name).mkdir()
        os.utime(cache.root / name, (time.time() - age,) * 2)
    made(cache)
    assert [f.name for f in entries(cache)][:-1] == [".partial-new"]


def test_of_several_at_once_one_makes_it_and_the_others_wait(cache, monkeypatch):
    calls = count_calls(monkeypatch)
    real = Tokenizing.__call__
    monkeypatch.setattr(Tokenizing, "__call__", lambda self, *args: (time.sleep(0.2), real(self, *args))[1])
    found = []
    threads = [threading.Thread(target=lambda: found.append(list(made(cache).samples))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 3  # the parts of one
    assert found == [list(made(None).samples)] * 4


def test_a_folder_that_cannot_be_used_is_said_and_not_needed(tmp_path, cache):
    (tmp_path / "file").touch()
    done = made(TokenCache(tmp_path / "file" / "tokens", 10**9))
    assert list(done.samples) == list(made(None).samples)
    assert len(done.notes) == 1
    assert "tokens are not cached" in done.notes[0]
    assert "set LORAKIT_CACHE" in done.notes[0]


def test_the_environment_says_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert TokenCache.here() == TokenCache(tmp_path / "tokens", 20 * 10**9)
    monkeypatch.setenv("LORAKIT_CACHE_GB", "0.5")
    assert TokenCache.here() == TokenCache(tmp_path / "tokens", 5 * 10**8)
    monkeypatch.delenv("LORAKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert TokenCache.here().root == tmp_path / "xdg" / "lorakit" / "tokens"
    for size in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("LORAKIT_CACHE_GB", size)
        with pytest.raises(BadParameter, match="expected a number of gigabytes"):
            TokenCache.here()
    for off in ("off", "OFF", "0"):
        monkeypatch.setenv("LORAKIT_CACHE", off)
        assert TokenCache.here() is None


def test_few_rows_need_no_disk(tmp_path):
    cache = TokenCache(tmp_path / "tokens", 10**9)
    made(cache)
    assert not cache.root.exists()
