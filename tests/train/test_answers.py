"""Held-out rows answered by base and adapter, for every shape of row."""

from typing import Any

import pytest
import torch

import lorakit.train.answers as answers
from lorakit.core.attach import Adapted, attach
from lorakit.core.method import get_method
from lorakit.data.encoded import encode_pair
from lorakit.data.row import Row
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.train.answers import Held, held_out, samples, shown
from lorakit.train.metrics import forward_loss
from lorakit.train.rows import Rows

TOKENIZER = tiny_tokenizer()
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "TOKENS", 6)


@pytest.fixture
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def adapted(arch: str = "llama", **overrides: Any) -> Adapted:
    """A tiny model whose adapter changes what it says."""
    torch.manual_seed(0)
    model = tiny_model(arch, vocab_size=len(TOKENIZER), **overrides)
    model.config.pad_token_id = TOKENIZER.pad_token_id
    found = attach(model, get_method("lora", r=4, alpha=64.0))
    with torch.no_grad():
        for row in found.params():
            row.tensor.normal_(0, 1.0)
    return found


def greedy(model: Any, ids: list[int]) -> str:
    """Greedy decoding, written out."""
    new: list[int] = []
    while len(new) < answers.TOKENS and TOKENIZER.eos_token_id not in new:
        with torch.no_grad():
            new.append(int(model.eval()(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    text = str(TOKENIZER.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text if TOKENIZER.eos_token_id in new else text + " …"


def test_a_prompt_is_answered_by_the_base_and_by_the_adapter() -> None:
    here = adapted()
    (one,) = samples(here, TOKENIZER, [{"prompt": "what is it?", "completion": "that"}])
    ids = TOKENIZER("what is it?")["input_ids"]
    assert (one.prompt, one.reference) == ("what is it?", "that")
    assert one.after == greedy(here.model, ids)
    with here.disabled():
        assert one.before == greedy(here.model, ids)
    assert one.before != one.after


def test_a_text_is_continued_from_its_middle() -> None:
    here = adapted()
    (one,) = samples(here, TOKENIZER, [{"text": "abcdefgh"}])
    assert (one.prompt, one.reference) == ("abc", "defgh")  # the first token is BOS
    assert one.after == greedy(here.model, TOKENIZER("abc")["input_ids"])
    (long,) = samples(here, TOKENIZER, [{"text": "a" * 500}], max_length=64)
    assert set(long.prompt) == {"a"} and 20 < len(long.prompt) < 64 * 4 and long.reference.endswith("a …")


def test_a_chat_stops_before_the_last_answer_that_is_learned(tokenizer: Any) -> None:
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "no")]
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    here = adapted()
    one, two = samples(here, tokenizer, [{"messages": messages}, {"messages": [*messages[:4], messages[4] | {"train": False}]}])
    assert one.reference == "no" and one.prompt.endswith("[assistant] hello\n[user] more")
    assert one.after == greedy(here.model, tokenizer("<system>be brief<user>hi<assistant>hello<user>more<assistant>")["input_ids"])
    assert two.reference == "hello" and two.prompt == "[system] be brief\n[user] hi"


TOOL = {"type": "function", "function": {"name": "gcd", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}}}
CALL = {"type": "function", "function": {"name": "gcd", "arguments": {"a": 12, "b": 18}}}
SAID = '{"name": "gcd", "arguments": {"a": 12, "b": 18}}'


def test_calls_of_tools_are_shown(tokenizer: Any) -> None:
    """A message whose content is empty says what it calls, and a prompt says what may be called."""
    asked: dict[str, Any] = {"role": "user", "content": "of 12 and 18?"}
    calls: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    rest: list[dict[str, Any]] = [{"role": "tool", "content": "6"}, {"role": "assistant", "content": "6."}]
    nameless = {"type": "function", "function": {"name": "now", "parameters": {}}}
    rows: list[Row] = [
        {"messages": [asked, calls], "tools": [TOOL, nameless]},
        {"messages": [asked, calls | {"content": "let me see"}, *rest]},
    ]
    one, two = samples(adapted(), tokenizer, rows)
    assert one.prompt == "[tools] gcd(a, b), now()\n[user] of 12 and 18?" and one.reference == f"{SAID}\n{SAID}"
    assert two.prompt == f"[user] of 12 and 18?\n[assistant] let me see\n{SAID}\n{SAID}\n[tool] 6" and two.reference == "6."
    (three,) = samples(adapted(), tokenizer, [{"prompt": [asked], "chosen": [calls], "rejected": rest[1:], "tools": [TOOL]}])
    assert three.prompt.startswith("[tools] gcd(a, b)") and f"chosen: {SAID}\n{SAID}\nrejected: 6." == three.reference
    (four,) = samples(adapted(), tokenizer, [{"prompt": [asked], "completion": [calls], "label": True, "tools": [TOOL]}])
    assert four.prompt.startswith("[tools] gcd(a, b)") and SAID in four.reference


def test_it_is_known_whether_rows_are_conversations() -> None:
    said = [{"role": "user", "content": "a"}]
    rows: list[tuple[Row, bool]] = [
        ({"messages": said}, True),
        ({"prompt": said, "chosen": said, "rejected": said}, True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, False),
        ({"prompt": "a", "completion": "b", "label": True}, False),
        ({"text": "a"}, False),
    ]
    assert [held_out([Rows([row], [row])], 1).talks for row, _ in rows] == [talks for _, talks in rows]


@pytest.mark.parametrize("arch", ["t5"])
def test_an_encoder_decoder_answers_its_prompt(arch: str) -> None:
    (one,) = samples(adapted(arch), TOKENIZER, [{"prompt": "abc", "completion": "cba"}])
    assert one.reference == "cba" and isinstance(one.after, str)


def classifier(kind: str, labels: int) -> Adapted:
    from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

    of = {"classify": LlamaForSequenceClassification, "tag": LlamaForTokenClassification}[kind]
    torch.manual_seed(0)
    config = tiny_model("llama", vocab_size=len(TOKENIZER)).config
    config.num_labels, config.pad_token_id = labels, TOKENIZER.pad_token_id
    found = attach(of(config), get_method("lora", r=4, alpha=64.0))
    with torch.no_grad():
        for row in found.params():
            row.tensor.normal_(0, 1.0)
    return found


def test_classes_have_probabilities_before_and_after() -> None:
    here = classifier("classify", 3)
    (one,) = samples(here, TOKENIZER, [{"text": "abc", "label": "b"}], labels=["a", "b", "c"])
    with torch.no_grad():
        p = here.model(input_ids=torch.tensor([TOKENIZER("abc")["input_ids"]])).logits[0].softmax(-1)
    found = {name: after for name, _, after in one.table[1:]}
    assert found == {name: f"{100 * float(p[i]):.1f} %" for i, name in enumerate("abc")}
    assert one.reference == "b" and one.after == "abc"[int(p.argmax())] == one.table[1][0]


def test_tags_stand_beside_their_words() -> None:
    here = classifier("tag", 2)
    (one,) = samples(here, TOKENIZER, [{"tokens": ["ab", "c"], "tags": ["O", "P"]}], labels=["O", "P"])
    assert [row[:2] for row in one.table] == [["word", "in the data"], ["ab", "O"], ["c", "P"]]
    right = sum(row[1] == row[3] for row in one.table[1:])
    assert one.after == f"{right} of 2 tags right"


@pytest.mark.parametrize("messages", [False, True])
def test_preferences_and_feedback_have_the_answers_log_probability(messages: bool, tokenizer: Any) -> None:
    def said(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if messages else text

    here = adapted()
    row: Row = {"prompt": said("user", "which?"), "chosen": said("assistant", "this"), "rejected": said("assistant", "that")}
    (one,) = samples(here, tokenizer, [row])
    if not messages:
        pair = encode_pair(TOKENIZER, "which?", "this")
        batch = {"input_ids": torch.tensor([pair.input_ids]), "labels": torch.tensor([pair.labels])}
        assert float(one.table[1][2]) == pytest.approx(-forward_loss(here.model.eval(), batch)[0].item(), abs=0.01)
    before, after = ([float(line[i]) for line in one.table[1:]] for i in (1, 2))
    assert before[2] == pytest.approx(before[0] - before[1], abs=0.02) and after[2] == pytest.approx(after[0] - after[1], abs=0.02)
    assert one.prompt == "which?" and "chosen: this" in one.reference
    (two,) = samples(here, tokenizer, [{"prompt": row["prompt"], "completion": row["chosen"], "label": True}])
    assert two.table[1][1:] == one.table[1][1:] and two.reference == "desirable: this"


def test_answers_take_no_more_than_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SECONDS", 0.0)
    monkeypatch.setattr(answers, "TOKENS", 4000)
    here = adapted(max_position_embeddings=8192)
    (one,) = samples(here, TOKENIZER, [{"prompt": "abc", "completion": "d"}])
    assert one.before.endswith(" …") and len(one.before) < 3000


def test_rows_are_evenly_spaced() -> None:
    rows: list[Row] = [{"text": str(i)} for i in range(10)]
    assert [row["text"] for row in shown(rows, 3)] == ["0", "3", "6"]
    assert shown(rows, 99) == rows and shown([], 3) == [] and shown(rows, 0) == []
    tasks = [Rows(rows, rows[:5]), Rows(rows, rows[5:])]
    found = held_out(tasks, 3)
    assert found == Held("text", held_out(tasks, 0).hash, [rows[0], rows[2], rows[5]])
    assert found.hash != held_out(tasks[:1], 3).hash


def test_no_rows_no_samples() -> None:
    assert samples(adapted(), TOKENIZER, []) == []
