import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lorakit.core.errors import DataError
from lorakit.data.encoded import IGNORED, encode_pair, encode_text, encode_translations
from lorakit.data.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def framed(single):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    return tokenizer


@given(st.text(min_size=1).filter(lambda text: not text.endswith("<eos>")))
def test_text_is_all_trained_on_and_closed_once(text):
    sample = encode_text(TOKENIZER, text)
    assert sample.labels == sample.input_ids
    assert sample.labels is not sample.input_ids
    assert TOKENIZER.decode(sample.input_ids) == text + "<eos>"


def test_a_special_token_spelled_in_the_text_is_that_token():
    assert encode_text(TOKENIZER, "a<eos>").input_ids == [*TOKENIZER("a").input_ids, 1]


@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
def test_a_pair_is_trained_on_its_completion_and_end(prompt, completion):
    sample = encode_pair(TOKENIZER, prompt, completion)
    assert TOKENIZER.decode(sample.input_ids) == prompt + completion + "<eos>"
    assert TOKENIZER.decode([label for label in sample.labels if label != IGNORED]) == completion + "<eos>"
    assert sample.trained == sum(label != IGNORED for label in sample.labels)
    assert sample.input_ids[: len(TOKENIZER(prompt).input_ids)] == TOKENIZER(prompt).input_ids


def test_a_tokenizer_s_own_frame_is_kept_but_never_doubled():
    both, start = framed("<bos> $A <eos>"), framed("<bos> $A")
    assert encode_text(both, "ab").input_ids == encode_text(start, "ab").input_ids == [2, *TOKENIZER("ab").input_ids, 1]
    assert encode_pair(both, "a", "b") == encode_pair(start, "a", "b")
    assert encode_pair(both, "a", "b").input_ids == [2, *TOKENIZER("a").input_ids, *TOKENIZER("b").input_ids, 1]


def test_an_encoder_decoder_sample_keeps_prompt_and_target_apart():
    (sample,) = encode_translations(framed("$A <eos>"), [("ab", "c")])
    assert sample.input_ids == [*TOKENIZER("ab").input_ids, 1]
    assert sample.labels == [*TOKENIZER("c").input_ids, 1]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no EOS token, .* set tokenizer\.eos_token"):
        encode_text(tokenizer, "a")
