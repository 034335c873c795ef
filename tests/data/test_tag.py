"""Tags on first sub-tokens: aligned as fast tokenizers align them, with any tokenizer."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorakit.core.errors import DataError
from lorakit.data import tag
from lorakit.data.encoded import IGNORED
from lorakit.data.tag import Words, encode_words, tokenize_tags
from lorakit.data.tiny import tiny_tokenizer

ROWS = [
    {"tokens": ["Anna", "lives", "in", "New", "York"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]},
    {"tokens": ["it", "rains"], "tags": ["O", "O"]},
]
NAMES = ["B-LOC", "B-PER", "I-LOC", "O"]


def wordpiece() -> Any:
    """As BERT's: lower case, [CLS] and [SEP] around."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters), "live", "##s"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def metaspace() -> Any:
    """As Llama's: a blank before the first word is added, a BOS stands in front."""
    pieces = ["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzANY", "▁in"]
    merges = [("▁", "i"), ("▁i", "n")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "▁i"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [wordpiece, metaspace, tiny_tokenizer])
def test_words_are_what_they_are_in_running_text(make: Any) -> None:
    check_running_text(make)


def check_running_text(make: Any) -> None:
    tokenizer, words = make(), ROWS[0]["tokens"]
    (sample,) = tokenize_tags(tokenizer, ROWS[:1], NAMES, max_length=64).samples
    assert sample.input_ids == tokenizer(" ".join(words))["input_ids"]
    kept = [label for label in sample.labels if label != IGNORED]
    assert [NAMES[label] for label in kept] == ROWS[0]["tags"]


def test_labels_are_where_a_fast_tokenizer_says_that_words_begin() -> None:
    tokenizer = wordpiece()
    encoding = tokenizer(ROWS[0]["tokens"], is_split_into_words=True)
    (sample,) = tokenize_tags(tokenizer, ROWS[:1], NAMES, max_length=64).samples
    assert sample.input_ids == encoding["input_ids"]
    words = encoding.word_ids()
    firsts = [i for i, w in enumerate(words) if w is not None and w != words[i - 1]]
    assert [i for i, label in enumerate(sample.labels) if label != IGNORED] == firsts


def test_a_word_that_is_dropped_has_no_label_and_shifts_none() -> None:
    check_dropped()


def check_dropped() -> None:
    row = {"tokens": ["a", "\u200b\x00", "bc", "d"], "tags": ["O", "B-PER", "B-LOC", "I-LOC"]}
    (sample,) = tokenize_tags(wordpiece(), [row], NAMES, max_length=64).samples
    assert [NAMES[label] for label in sample.labels if label != IGNORED] == ["O", "B-LOC", "I-LOC"]
    ids, firsts = encode_words(wordpiece(), row["tokens"])
    assert firsts == [1, None, 2, 4]
    assert ids == sample.input_ids


def test_long_rows_lose_words_and_keep_what_closes_them() -> None:
    tokenizer = wordpiece()
    done = tokenize_tags(tokenizer, ROWS, NAMES, max_length=7)
    assert (done.truncated, done.dropped, len(done.samples)) == (2, 0, 2)
    for sample in done.samples:
        assert len(sample.input_ids) == len(sample.labels) == 7
        assert (sample.input_ids[0], sample.input_ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    with pytest.raises(DataError, match="the tokenizer's own tokens take all of it"):
        tokenize_tags(tokenizer, ROWS, NAMES, max_length=2)


def test_tags_are_numbered_and_unknown_ones_named() -> None:
    with pytest.raises(DataError, match=r"'I-LOC' is not among the known ones\. Did you mean 'B-LOC'"):
        tokenize_tags(wordpiece(), ROWS, ["B-LOC", "B-PER", "O"], max_length=64)
    with pytest.raises(DataError, match="these rows are classify data"):
        tokenize_tags(wordpiece(), [{"text": "a", "label": "b"}], NAMES, max_length=64)
    numbers = [{"tokens": ["a", "b"], "tags": [7, 3], "kind": 2}]
    (sample,) = tokenize_tags(wordpiece(), numbers, [3, 7], max_length=64).samples
    assert [label for label in sample.labels if label != IGNORED] == [1, 0]
    assert sample.kind == 2


def _on_every_piece(m: pytest.MonkeyPatch) -> None:
    m.setattr(tag, "_labels", lambda piece, number: [number] * len(piece))


def _without_blanks(m: pytest.MonkeyPatch) -> None:
    real = Words.__init__

    def init(self: Words, tokenizer: Any) -> None:
        real(self, tokenizer)
        self.blank = ""

    m.setattr(Words, "__init__", init)


def _of_dropped_words(m: pytest.MonkeyPatch) -> None:
    m.setattr(tag, "_labels", lambda piece, number: [number, *[IGNORED] * (len(piece) - 1)])


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_on_every_piece, lambda: check_running_text(wordpiece)),
        (_without_blanks, lambda: check_running_text(tiny_tokenizer)),
        (_of_dropped_words, check_dropped),
    ],
)
def test_mutants_are_seen(change: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_tags_give_an_account() -> None:
    tokenizer = wordpiece()
    done = tokenize_tags(tokenizer, ROWS, NAMES, max_length=7)
    whole = [len(tokenizer(" ".join(row["tokens"]))["input_ids"]) for row in ROWS]
    assert done.account is not None
    counts = done.account.counts
    assert (counts.rows, counts.samples, counts.truncated, counts.cut) == (2, 2, 2, sum(whole) - 14)
    assert (counts.tokens, counts.trained) == (14, sum(sample.trained for sample in done.samples))
    assert counts.largest == max(token for sample in done.samples for token in sample.input_ids)
    assert [line.split()[0] for line in done.account.lines()] == ["tokens", "truncation", "padding"]
    assert done.account.notes()[0].startswith("2 of 2 rows are longer than max_length=7")


def test_an_unknown_tag_is_named_with_its_row() -> None:
    with pytest.raises(DataError, match="row 2: the tag 'X' is not among the known ones"):
        tokenize_tags(wordpiece(), [*ROWS[:1], {"tokens": ["a"], "tags": ["X"]}], NAMES, max_length=64)
