import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel
from transformers import ByT5Tokenizer

from lorakit.core.errors import DataError
from lorakit.data.chat import Chats, encode_chat
from lorakit.data.encoded import IGNORED
from lorakit.data.tiny import CHAT_TEMPLATE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<eos>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<eos>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
BARE = (  # no special token anywhere: the line break is the end of a turn
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '\\n' }}{% endgeneration %}{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "(m['content'] | trim)")
SPACED = BARE.replace("'\\n'", "' '")  # a turn ends in a blank, which some tokenizers leave out of their offsets
TEMPLATES = {"tiny": CHAT_TEMPLATE, "chatml": CHATML, "bare": BARE, "trimmed": TRIMMED, "spaced": SPACED}


def unmarked(template):
    return re.sub(r"\{% (end)?generation %\}", "", template)


def chat(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def trained(sample, tokenizer=TOKENIZER):
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


content = st.text(alphabet=st.sampled_from("ab th\n  é中🙂def"), max_size=12)
conversations = st.lists(content, min_size=2, max_size=6)


@given(conversations, st.sampled_from(list(TEMPLATES)))
def test_prefix_difference_equals_the_generation_mask(contents, name):
    template, messages = TEMPLATES[name], chat(*contents)
    marked = encode_chat(TOKENIZER, messages, chat_template=template)
    assert encode_chat(TOKENIZER, messages, chat_template=unmarked(template)) == marked


@given(conversations, st.sampled_from(list(TEMPLATES)))
def test_tokens_and_mask_are_those_of_transformers(contents, name):
    template, messages = TEMPLATES[name], chat(*contents)
    theirs = TOKENIZER.apply_chat_template(messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode_chat(TOKENIZER, messages, chat_template=template)
    assert ours.input_ids == theirs["input_ids"]
    assert [int(label != IGNORED) for label in ours.labels] == theirs["assistant_masks"]


@given(conversations, st.sampled_from(list(TEMPLATES)))
def test_offsets_that_leave_out_blanks_change_nothing(contents, name):
    trimming = tiny_tokenizer()
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    messages = chat(*contents)
    assert encode_chat(trimming, messages, chat_template=TEMPLATES[name]) == encode_chat(TOKENIZER, messages, chat_template=TEMPLATES[name])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, unmarked(CHAT_TEMPLATE), CHATML, unmarked(CHATML)])
def test_what_is_trained_on_is_the_answers_and_their_ends(template):
    messages = [{"role": "system", "content": "be brief"}, *chat("hi", "yo", "more?", "no")]
    sample = encode_chat(TOKENIZER, messages, chat_template=template)
    assert trained(sample) == "yo<eos>no<eos>"
    assert all(label in (IGNORED, i) for i, label in zip(sample.input_ids, sample.labels, strict=True))


LLAMA_3 = (  # as published, with this tokenizer's special tokens
    "{% for m in messages %}{% set content = '<|' + m['role'] + '|>\\n\\n' + m['content'] | trim + '<eos>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def test_published_shapes_of_templates_work_by_prefix():
    messages = chat("hi", " yo ", "more?", "no")
    assert trained(encode_chat(TOKENIZER, messages, chat_template=LLAMA_3)) == "yo<eos>no<eos>"
    assert trained(encode_chat(TOKENIZER, messages, chat_template=MISTRAL)) == "  yo <eos> no<eos>"


def test_without_special_tokens_the_line_break_ends_the_turn():
    assert trained(encode_chat(TOKENIZER, chat("hi", "yo", "a", "b"), chat_template=unmarked(BARE))) == "yo\nb\n"


def test_an_eos_outside_the_generation_block_is_learned_all_the_same():
    template = CHATML.replace("{{ m['content'] + '<eos>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<eos>' }}")
    assert template != CHATML
    assert encode_chat(TOKENIZER, chat("hi", "yo"), chat_template=template) == encode_chat(
        TOKENIZER, chat("hi", "yo"), chat_template=CHATML
    )


def test_a_token_that_spans_the_turn_s_start_is_trained_on():
    sample = encode_chat(TOKENIZER, chat("hi", "\n\nyo"), chat_template=unmarked(CHAT_TEMPLATE))
    assert trained(sample) == "\n\n\nyo<eos>"  # the prompt's line break and the answer's are one token


def test_all_trains_on_everything():
    sample = encode_chat(TOKENIZER, chat("hi", "yo"), train_on="all")
    assert sample.labels == sample.input_ids


def test_an_assistant_may_speak_first_or_twice():
    assert trained(encode_chat(TOKENIZER, chat("a", "b", first="assistant"), chat_template=unmarked(CHATML))) == "a<eos>"
    twice = [{"role": "user", "content": "x"}, *({"role": "assistant", "content": c} for c in "ab")]
    assert trained(encode_chat(TOKENIZER, twice, chat_template=unmarked(CHATML))) == "a<eos>b<eos>"


THINKING = (  # earlier turns lose their reasoning, as in several published templates
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think>..</think>' }}"
    "{% endif %}{{ m['content'] + '<eos>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def test_a_template_that_rewrites_history_is_refused_where_it_matters():
    assert trained(encode_chat(TOKENIZER, chat("hi", "yo"), chat_template=THINKING)) == "<think>..</think>yo<eos>"
    with pytest.raises(
        DataError, match=r"does not continue what it rendered up to message 2: '<think>.*pass a chat_template with"
    ) as error:
        encode_chat(TOKENIZER, chat("hi", "yo", "more", "no"), chat_template=THINKING)
    assert "\n" not in str(error.value)
    opened = unmarked(CHATML).replace("'<|assistant|>\\n' }}{% endif %}", "'<|assistant|>\\n<think>' }}{% endif %}")
    with pytest.raises(DataError, match="up to message 2: "):
        encode_chat(TOKENIZER, chat("hi", "yo"), chat_template=opened)


def test_what_cannot_be_encoded_is_one_clear_line():
    with pytest.raises(DataError, match="has no default chat template; pass chat_template=a Jinja template"):
        encode_chat(tiny_tokenizer(chat_template=None), chat("a", "b"))
    with pytest.raises(DataError, match="no assistant message to learn from"):
        encode_chat(TOKENIZER, chat("a"))
    with pytest.raises(DataError, match="train_on is 'user'; choose 'assistant', 'last' or 'all'"):
        encode_chat(TOKENIZER, chat("a", "b"), train_on="user")
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    with pytest.raises(DataError, match=r"refuses a conversation with the roles user, assistant: system first|roles user: system first"):
        encode_chat(TOKENIZER, chat("a", "b"), chat_template=strict)
    with pytest.raises(DataError, match="marks nothing"):
        encode_chat(
            TOKENIZER,
            chat("a", "b"),
            chat_template="{{ messages[0]['content'] }}{% if false %}{% generation %}{% endgeneration %}{% endif %}",
        )


def test_named_templates_can_be_chosen():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"short": BARE, "long": CHATML}
    assert encode_chat(tokenizer, chat("a", "b"), chat_template="short") == encode_chat(TOKENIZER, chat("a", "b"), chat_template=BARE)
    with pytest.raises(DataError, match=r"the name of one of its templates \(long, short\)"):
        encode_chat(tokenizer, chat("a", "b"))


@given(conversations)
def test_a_tokenizer_without_offsets_goes_by_token_prefixes(contents):
    tokenizer = ByT5Tokenizer()  # bytes: every prefix is a prefix
    for chosen in (BARE, unmarked(BARE)):
        assert trained(encode_chat(tokenizer, chat(*contents), chat_template=chosen), tokenizer) == "".join(
            c + "\n" for c in contents[1::2]
        )


class Joining:
    """A tokenizer without offsets whose tokens depend on what follows: the whole text is one token."""

    is_fast, eos_token, special_tokens_map, added_tokens_decoder, chat_template = False, None, {}, {}, BARE

    def get_chat_template(self, given, tools=None):
        return given or self.chat_template

    def __call__(self, text, **_):
        return {"input_ids": [[len(one)] for one in text]}


def test_an_unstable_tokenizer_without_offsets_is_refused():
    with pytest.raises(DataError, match="reports no offsets; load its fast version"):
        encode_chat(Joining(), chat("a", "b"))


# ------------------------------------------------------------------------------------------------------- messages that say so themselves
def flagged(*said):
    """Messages of (role, content) or (role, content, train)."""
    return [{"role": role, "content": text} | ({"train": train[0]} if train else {}) for role, text, *train in said]


MARKED_OR_NOT = pytest.mark.parametrize("template", [CHATML, unmarked(CHATML)], ids=["marked", "prefix"])


@MARKED_OR_NOT
def test_a_message_says_itself_whether_it_is_learned(template):
    messages = flagged(("user", "q", False), ("assistant", "one", False), ("user", "r"), ("assistant", "two", True), ("assistant", "three"))
    assert trained(encode_chat(TOKENIZER, messages, chat_template=template)) == "two<eos>three<eos>"
    messages = flagged(("user", "q", True), ("assistant", "one"))
    assert trained(encode_chat(TOKENIZER, messages, chat_template=template)) == "<|user|>\nq<eos>one<eos>"
    messages = flagged(("user", "q"), ("assistant", "one", False))
    assert encode_chat(TOKENIZER, messages, chat_template=template).trained == 0
    plain = flagged(("user", "q"), ("assistant", "one"))
    assert (
        encode_chat(TOKENIZER, messages, chat_template=template).input_ids
        == encode_chat(TOKENIZER, plain, chat_template=template).input_ids
    )


@MARKED_OR_NOT
def test_the_last_turn_alone_can_be_learned(template):
    messages = chat("q", "one", "r", "two", "s")
    assert trained(encode_chat(TOKENIZER, messages, chat_template=template, train_on="last")) == "two<eos>"
    messages[1]["train"] = True
    assert trained(encode_chat(TOKENIZER, messages, chat_template=template, train_on="last")) == "one<eos>two<eos>"


def test_a_message_can_be_left_out_of_everything():
    messages = flagged(("user", "q", False), ("assistant", "one"), ("user", "r"), ("assistant", "two", False))
    sample = encode_chat(TOKENIZER, messages, chat_template=CHATML, train_on="all")
    assert trained(sample) == "\n<|assistant|>\none<eos>\n<|user|>\nr<eos>\n<|assistant|>\n\n"
    messages = flagged(("user", "q"), ("assistant", "one", True))
    assert encode_chat(TOKENIZER, messages, chat_template=CHATML, train_on="all").trained == len(
        encode_chat(TOKENIZER, messages, chat_template=CHATML).input_ids
    )


def test_the_flag_is_no_matter_of_the_template():
    telling = CHATML.replace("m['content'] + '<eos>'", "m['content'] + (m.train | string) + '<eos>'")
    messages = flagged(("user", "q"), ("assistant", "one", True))
    assert "True" not in TOKENIZER.decode(encode_chat(TOKENIZER, messages, chat_template=telling).input_ids)


# -- tools --------------------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}}}]
CALLING = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
WITH_TOOLS = (
    "{% for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [WITH_TOOLS, unmarked(WITH_TOOLS)])
def test_tools_are_shown_and_calls_of_them_learned(template):
    sample = encode_chat(TOKENIZER, CALLING, chat_template=template, tools=TOOLS)
    text = TOKENIZER.decode(sample.input_ids)
    assert text.startswith('<tool>{"type": "function", "function": {"name": "add"')
    assert trained(sample) == '[add {"a": 1, "b": 2}]<eos>It is 3.<eos>'
    assert not Chats(TOKENIZER, chat_template=template).blind(CALLING, TOOLS)
    bare = encode_chat(TOKENIZER, CALLING, chat_template=template)
    assert "<tool>{" not in TOKENIZER.decode(bare.input_ids)
    assert trained(bare) == trained(sample)


def test_a_template_without_tools_gets_calls_as_json():
    sample = encode_chat(TOKENIZER, CALLING, tools=TOOLS)
    assert trained(sample) == '{"name": "add", "arguments": {"a": 1, "b": 2}}<eos>It is 3.<eos>'
    assert sample == encode_chat(TOKENIZER, CALLING)
    chats = Chats(TOKENIZER)
    assert chats.blind(CALLING) and chats.blind(CALLING[:1], TOOLS) and not chats.blind(CALLING[:1])
    said = [*CALLING[:1], CALLING[1] | {"content": "Let me see."}]
    assert trained(encode_chat(TOKENIZER, said)).startswith('Let me see.\n{"name"')


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools():
    tokenizer = tiny_tokenizer(chat_template={"default": BARE, "tool_use": WITH_TOOLS})
    assert encode_chat(tokenizer, CALLING, tools=TOOLS) == encode_chat(TOKENIZER, CALLING, tools=TOOLS, chat_template=WITH_TOOLS)
    assert encode_chat(tokenizer, CALLING) == encode_chat(TOKENIZER, CALLING, chat_template=BARE)


@pytest.mark.parametrize("template", [WITH_TOOLS, BARE])
def test_a_prompt_is_what_training_has_before_the_answer(template):
    chats = Chats(TOKENIZER, chat_template=template)
    sample = chats.encode([CALLING], [TOOLS])[0]
    last = len(sample.labels) - next(i for i, label in enumerate(reversed(sample.labels)) if label == IGNORED)
    assert chats.prompt(CALLING[:-1], TOOLS) == sample.input_ids[:last]
    assert chats.prompt([{**m, "train": False} for m in CALLING[:-1]], TOOLS) == sample.input_ids[:last]
