"""Chat templates by name: every one renders, teaches the answer and its end alone, and agrees with the formats' makers."""

import pytest

from lorakit.data.chat import encode_chat
from lorakit.data.encoded import IGNORED
from lorakit.data.tiny import tiny_tokenizer
from lorakit.train.chat_templates import OTHER_NAMES, TEMPLATES, template_named

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_answers_and_their_ends_are_learned(name: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    sample = encode_chat(tokenizer, TALK, chat_template=TEMPLATES[name])
    text = tokenizer.decode(sample.input_ids)
    assert all(message["content"] in text for message in TALK), "nothing is lost"
    learned = tokenizer.decode([label for label in sample.labels if label != IGNORED])
    end = END.get(name, "<eos>")
    assert learned.replace(" ", "") == f"Hello.{end}Seeyou.{end}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_the_answer_follows(name: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATES[name])
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    prompt = tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert isinstance(whole, str) and isinstance(prompt, str)
    assert whole.startswith(prompt) and whole[len(prompt) :].lstrip().startswith("See you.")


def test_formats_are_those_of_their_makers() -> None:
    def said(name: str) -> object:
        return tiny_tokenizer(chat_template=TEMPLATES[name]).apply_chat_template(TALK[:3], tokenize=False)

    assert said("chatml") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    )
    assert said("llama3") == (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    )
    assert said("llama2") == "<bos>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. <eos>"
    assert said("gemma") == "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    assert said("zephyr") == "<|system|>\nBe brief.<eos>\n<|user|>\nHi<eos>\n<|assistant|>\nHello.<eos>\n"


def test_other_names() -> None:
    assert {template_named(name) for name in OTHER_NAMES} <= TEMPLATES.keys()
    assert (template_named("qwen"), template_named("chatml"), template_named("none such")) == ("chatml", "chatml", None)
