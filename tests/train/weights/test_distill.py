"""Prompt distillation: what the base says under a prompt, without the prompt; and α that grades it (arXiv:2311.09773)."""

from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.core.errors import BadParameter, DataError
from lorakit.data.chat import encode_chat
from lorakit.data.encoded import encode_pair
from lorakit.data.source import load_rows
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.train.weights import control_pe, distill_prompt, few_shots

INPUTS = ["red", "blue sky", "one two three", "hello"]
P = "Answer like a pirate: "


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def model_for(tokenizer, **options):
    return tiny_model("llama", vocab_size=len(tokenizer), **options)


def greedy(model, ids: list[int], n: int) -> list[int]:
    with torch.no_grad():
        for _ in range(n):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-n:]


def test_rows_hold_what_the_base_says_under_the_prompt_and_the_prompt_nowhere(tokenizer, tmp_path: Path) -> None:
    model = model_for(tokenizer).train()
    done = distill_prompt(model, tokenizer, P, INPUTS, tmp_path / "data.jsonl", max_new_tokens=6)
    assert model.training
    rows = load_rows(done.file, "train", valid=done.file)
    assert [row["prompt"] for row in rows] == INPUTS and done.rows == len(INPUTS)
    assert "pirate" not in done.file.read_text()
    for row in rows:
        start = [t for t, label in zip(*_pair(tokenizer, P + row["prompt"]), strict=True) if label == -100]
        wanted = tokenizer.decode(greedy(model.eval(), start, 6), skip_special_tokens=True)
        assert row["completion"] == wanted
    plain = distill_prompt(model, tokenizer, "", INPUTS, tmp_path / "plain.jsonl", max_new_tokens=6)
    assert [r["completion"] for r in load_rows(plain.file, "train", valid=plain.file)] != [row["completion"] for row in rows]


def _pair(tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    one = encode_pair(tokenizer, prompt, "x")
    return one.input_ids, one.labels


def test_controls_are_answered_without_the_prompt(tokenizer, tmp_path: Path) -> None:
    model = model_for(tokenizer)
    both = distill_prompt(model, tokenizer, P, INPUTS[:2], tmp_path / "a.jsonl", controls=INPUTS[2:], max_new_tokens=5)
    plain = distill_prompt(model, tokenizer, "", INPUTS[2:], tmp_path / "b.jsonl", max_new_tokens=5)
    assert load_rows(both.file, "train", valid=both.file)[2:] == load_rows(plain.file, "train", valid=plain.file)


def test_chat_uses_the_template_with_the_prompt_as_system_message_and_trains_without_it(tokenizer, tmp_path: Path) -> None:
    model, asked = model_for(tokenizer), []
    generate = model.generate

    def watch(start, **options):
        asked.append(start[0].tolist())
        return generate(start, **options)

    model.generate = watch
    done = distill_prompt(model, tokenizer, P, INPUTS[:2], tmp_path / "chat.jsonl", controls=["hi"], chat=True, max_new_tokens=5)
    rows = load_rows(done.file, "train", valid=done.file)
    assert [[m["role"] for m in row["messages"]] for row in rows] == [["user", "assistant"]] * 3
    said = [{"role": "system", "content": P}, {"role": "user", "content": INPUTS[0]}]
    assert asked[0] == tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
    bare = tokenizer.apply_chat_template(said[1:], add_generation_prompt=True, return_dict=True)["input_ids"]
    trained = encode_chat(tokenizer, rows[0]["messages"])
    assert trained.input_ids[: len(bare)] == bare, "the same template minus the prompt"
    alone = [{"role": "user", "content": "hi"}]
    assert asked[2] == tokenizer.apply_chat_template(alone, add_generation_prompt=True, return_dict=True)["input_ids"]


def test_ends_are_counted(tokenizer, tmp_path: Path) -> None:
    model = model_for(tokenizer)
    eos = tokenizer.eos_token_id
    answers = iter([[40, 41, eos], [eos], [40, 41, 42]])
    model.generate = lambda start, **options: torch.cat([start, torch.tensor([next(answers)])], 1)
    done = distill_prompt(model, tokenizer, P, INPUTS[:3], tmp_path / "d.jsonl", max_new_tokens=3)
    assert (done.rows, done.empty, done.unfinished) == (2, 1, 1)
    assert [row["prompt"] for row in load_rows(done.file, "train", valid=done.file)] == [INPUTS[0], INPUTS[2]]
    model.generate = lambda start, **options: torch.cat([start, torch.tensor([[eos]])], 1)
    with pytest.raises(DataError, match="answered all of 4 inputs with nothing"):
        distill_prompt(model, tokenizer, P, INPUTS, tmp_path / "e.jsonl")
    assert not (tmp_path / "e.jsonl").exists()


def test_what_cannot_be_distilled(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="more than the model's 256 positions"):
        distill_prompt(model_for(tokenizer), tokenizer, P * 20, INPUTS, tmp_path / "x.jsonl")
    classifier = tiny_model("llama", task="sequence-classification", vocab_size=len(tokenizer))
    with pytest.raises(BadParameter, match="generates no text"):
        distill_prompt(classifier, tokenizer, P, INPUTS, tmp_path / "x.jsonl")
    with pytest.raises(BadParameter, match="has no chat template"):
        distill_prompt(model_for(tokenizer), tiny_tokenizer(chat_template=None), P, INPUTS, tmp_path / "x.jsonl", chat=True)


def test_an_encoder_decoder_is_distilled_too(tokenizer, tmp_path: Path) -> None:
    model = tiny_model("t5", vocab_size=len(tokenizer))
    done = distill_prompt(model, tokenizer, P, INPUTS, tmp_path / "t5.jsonl", max_new_tokens=4)
    assert done.rows + done.empty == 4


def test_an_adapter_trained_on_it_has_the_effect_and_alpha_grades_it(tokenizer, tmp_path: Path) -> None:
    model = model_for(tokenizer)
    done = distill_prompt(model, tokenizer, P, INPUTS, tmp_path / "data.jsonl", max_new_tokens=8)
    rows = load_rows(done.file, "train", valid=done.file)
    objective = few_shots(model, tokenizer, rows)
    adapted = lorakit.attach(model, lorakit.get_method("lora", r=4))
    optimizer = torch.optim.Adam([p.tensor for p in adapted.params()], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        for loss, n in objective(model):
            (loss / n).backward()
        optimizer.step()
    one = adapted.state()
    adapted.detach()
    found = control_pe(model, [one], objective, values=(0.0, 0.25, 0.5, 0.75, 1.0))
    losses = [tried.loss for tried in found.tried]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.3 * losses[0]
    assert found.weights == [1.0]
