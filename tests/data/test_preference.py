"""Preferences and feedback as tokens: one prompt, loss on the answers alone, ends cut and counted, a mismatched answer for each."""

from typing import Any

import pytest
import torch

from lorakit.core.errors import DataError
from lorakit.data import preference
from lorakit.data.chat import Chats
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.preference import (
    collate_feedback,
    collate_preferences,
    rows_of,
    tokenize_answers,
)
from lorakit.data.tiny import tiny_tokenizer
from lorakit.data.tokenize import tokenize_rows
from lorakit.data.tokenized import Tokenizing

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def trained(sample: Encoded) -> str:
    return TOKENIZER.decode([label for label in sample.labels if label != IGNORED])


def say(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


CHAT = {
    "prompt": say(("user", "one?"), ("assistant", "said before"), ("user", "two?")),
    "chosen": say(("assistant", "good")),
    "rejected": say(("assistant", "bad one")),
}


def test_strings_are_tokenized_apart_and_only_answers_are_learned() -> None:
    (pair,) = tokenize_answers(TOKENIZER, [{"prompt": "ask ", "chosen": "yes", "rejected": "not"}], max_length=64).samples
    assert pair.chosen.input_ids == [*ids("ask "), *ids("yes"), EOS]
    assert pair.chosen.labels == [IGNORED] * len(ids("ask ")) + [*ids("yes"), EOS]
    assert trained(pair.rejected) == "not<eos>"


@pytest.mark.parametrize("marked", [True, False])
def test_of_a_conversation_only_the_answer_is_learned(marked: bool) -> None:
    template = TOKENIZER.chat_template
    for word in () if marked else ("{% generation %}", "{% endgeneration %}"):
        template = template.replace(word, "")
    (pair,) = tokenize_answers(tiny_tokenizer(chat_template=template), [CHAT], max_length=100).samples
    assert trained(pair.chosen) == "good<eos>"
    assert trained(pair.rejected) == "bad one<eos>"
    at = pair.chosen.labels.index(ids("good")[0])
    assert pair.chosen.input_ids[:at] == pair.rejected.input_ids[:at]
    assert "said before" in TOKENIZER.decode(pair.chosen.input_ids[:at])


def test_two_answers_after_other_prompts_are_refused() -> None:
    odd = CHAT | {"rejected": say(("system", "quite another turn"), ("assistant", "bad one"))}
    with pytest.raises(DataError, match="row 2: the prompt's tokens differ"):
        tokenize_answers(TOKENIZER, [CHAT, odd], max_length=100)
    done = tokenize_answers(TOKENIZER, [CHAT, odd], max_length=100, skip_bad=True)
    assert (len(done.samples), done.bad, done.dropped) == (1, 1, 0)
    assert done.account is not None and "row 2" in done.account.counts.named[0]


def test_an_answer_needs_the_assistant() -> None:
    with pytest.raises(DataError, match="no assistant message"):
        tokenize_answers(TOKENIZER, [CHAT | {"chosen": say(("user", "what"))}], max_length=100)


def test_ends_are_cut_and_pairs_without_a_side_dropped() -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a" * 6, "chosen": "b" * 9, "rejected": "c"},
        {"prompt": "a" * 30, "chosen": "b", "rejected": "c"},
    ]
    done = tokenize_answers(TOKENIZER, rows, max_length=10)
    assert (len(done.samples), done.truncated, done.dropped, done.rows) == (2, 1, 1, 3)
    assert all(len(side.input_ids) <= 10 for pair in done.samples for side in (pair.chosen, pair.rejected))
    assert done.samples[1].chosen.input_ids == (ids("a" * 6) + ids("b" * 9))[:10]
    with pytest.raises(DataError, match="none of the 1 rows"):
        tokenize_answers(TOKENIZER, rows[2:], max_length=10)


def test_rows_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match="these rows are pair data; expected preference or feedback rows"):
        tokenize_answers(TOKENIZER, [{"prompt": "a", "completion": "b"}], max_length=10)


def rated(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": p, "completion": "xyzuvw"[i], "label": i % 2 == 0} for i, p in enumerate(prompts)]


def mismatched(*prompts: str) -> list[str]:
    return [TOKENIZER.decode(one.mismatched.input_ids[:-1]) for one in tokenize_answers(TOKENIZER, rated(*prompts), max_length=32).samples]


def test_the_mismatched_answer_is_another_prompts() -> None:
    check_mismatched()


def check_mismatched() -> None:
    assert mismatched("a", "b", "c") == ["ay", "bz", "cx"]
    assert mismatched("a", "a", "b", "b", "a") == ["az", "az", "bv", "bv", "az"]
    assert mismatched("b", "a", "b", "b") == ["by", "az", "by", "by"]
    assert mismatched("a", "a", "a") == ["ay", "az", "ax"]


def test_feedback_keeps_its_labels_and_learns_answers_alone() -> None:
    done = tokenize_answers(TOKENIZER, rated("aaa", "b"), max_length=32)
    assert [one.desirable for one in done.samples] == [True, False]
    assert [trained(one.answer) for one in done.samples] == ["x<eos>", "y<eos>"]
    assert trained(done.samples[0].mismatched) == "y<eos>"
    conversations = [{"prompt": CHAT["prompt"], "completion": CHAT["chosen"], "label": True}]
    conversations.append({"prompt": say(("user", "other?")), "completion": CHAT["rejected"], "label": False})
    one, two = tokenize_answers(TOKENIZER, conversations, max_length=100).samples
    assert trained(one.mismatched) == trained(two.answer) == "bad one<eos>"
    assert "two?" in TOKENIZER.decode(one.mismatched.input_ids)


def test_batches_hold_both_halves_in_order() -> None:
    rows = [{"prompt": "ask", "chosen": "b" * (1 + i), "rejected": "c" * (5 - i), "kind": i} for i in range(3)]
    batch = collate_preferences(tokenize_answers(TOKENIZER, rows, max_length=64).samples, 0)
    assert batch["input_ids"].shape[0] == 6
    firsts = [row[row != IGNORED][0].item() for row in batch["labels"]]
    assert firsts == ids("b") * 3 + ids("c") * 3
    assert batch["kinds"][:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    batch = collate_feedback(tokenize_answers(TOKENIZER, rated("aaa", "bbbbbb"), max_length=64).samples, 0)
    assert batch["desirable"].tolist() == [True, False]


def test_some_rows_of_a_batch_are_what_they_are_alone() -> None:
    for encoder_decoder in (False, True):
        rows = [{"prompt": "a" * n, "completion": "b" * m, "label": True} for n, m in ((3, 5), (9, 2), (2, 9), (12, 1))]
        done = tokenize_answers(TOKENIZER, rows, max_length=64, encoder_decoder=encoder_decoder).samples
        whole = collate_feedback(done, 0)
        for where in (slice(0, 2), slice(4, 6), slice(0, 4)):
            part = rows_of(whole, where)
            samples = [*(one.answer for one in done), *(one.mismatched for one in done)][where]
            alone = collate_preferences([preference.Preferred(s, s) for s in samples], 0)
            for key, value in part.items():
                assert torch.equal(value, alone[key][: len(samples)]), (key, where, encoder_decoder)


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer() -> None:
    (pair,) = tokenize_answers(
        TOKENIZER, [{"prompt": "ask", "chosen": "yes", "rejected": "no"}], max_length=16, encoder_decoder=True
    ).samples
    assert pair.chosen.input_ids == pair.rejected.input_ids == ids("ask")
    assert pair.rejected.labels == [*ids("no"), EOS]
    with pytest.raises(DataError, match="no conversations"):
        tokenize_answers(TOKENIZER, [CHAT], max_length=16, encoder_decoder=True)


def _answers_of_the_same_prompt(m: pytest.MonkeyPatch) -> None:
    m.setattr(preference, "_partners", lambda prompts: [(i + 1) % len(prompts) for i in range(len(prompts))])


def _prompts_are_learned(m: pytest.MonkeyPatch) -> None:
    real = Chats.encode
    learned = lambda message: {**message, "train": message["role"] == "assistant"}  # noqa: E731
    m.setattr(Chats, "encode", lambda self, chats, tools: real(self, [[*map(learned, chat)] for chat in chats], tools))


def _nothing_is_cut(m: pytest.MonkeyPatch) -> None:
    m.setattr(Tokenizing, "cut", lambda self, sample: sample)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_answers_of_the_same_prompt, check_mismatched),
        (_prompts_are_learned, lambda: test_of_a_conversation_only_the_answer_is_learned(True)),
        (_nothing_is_cut, test_ends_are_cut_and_pairs_without_a_side_dropped),
    ],
)
def test_mutants_are_seen(change: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises((AssertionError, DataError)):
        check()


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_preferences_and_feedback_give_an_account(encoder_decoder: bool) -> None:
    options: Any = {"max_length": 8, "encoder_decoder": encoder_decoder}
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b" * 9, "rejected": "c"}]
    single = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    for rows, others in ((pairs, 2), (single, 0)):
        done = tokenize_answers(TOKENIZER, rows, **options)
        assert done.account is not None
        counts, prompts = done.account.counts, 2 + others
        ends = 2 + others * 2 + (8 if encoder_decoder else 7)  # "b" and EOS, "c" and EOS twice, and what is left of b's
        assert (counts.rows, counts.samples, counts.truncated, counts.dropped) == (2, 2, 1, 0)
        assert (counts.tokens, counts.trained, counts.cut) == (prompts + ends, ends, 2 if encoder_decoder else 3)
        assert counts.largest == max(*ids("abc" if others else "ab"), EOS, TOKENIZER.pad_token_id)
        assert [line.split()[0] for line in done.account.lines()] == ["tokens", "truncation", "padding"]


def test_rows_whose_tools_the_template_does_not_show_are_counted_and_noted() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    pairs = [CHAT, CHAT | {"tools": tools}, CHAT | {"chosen": called}]
    rated = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} | row for row in pairs]
    for row in rated:
        del row["chosen"], row["rejected"]
    talks = [{"messages": row["prompt"] + row["chosen"]} | {k: row[k] for k in row if k == "tools"} for row in pairs]
    done = [tokenize_answers(TOKENIZER, rows, max_length=128) for rows in (pairs, rated)] + [
        tokenize_rows(TOKENIZER, talks, max_length=128)
    ]
    for one in done:
        assert one.account is not None and one.account.counts.blind == 2
        assert any(note.startswith("in 2 of 3 rows there are tools that the chat template does not show") for note in one.account.notes())
