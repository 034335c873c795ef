"""`lorakit preprocess`: what training would see, for every kind of rows, with color or without."""

import json
import re
from pathlib import Path

import pytest

from lorakit.data import tokenized
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.train.config import make_config
from lorakit.train.dry_run import dry_run
from tests.cli.typed import run
from tests.train.runs import model_folder

KINDS = {
    "text": [{"text": f"the thing {i}"} for i in range(20)],
    "chat": [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(20)],
    "pair": [{"prompt": f"on {i} ", "completion": f"it {i}"} for i in range(20)],
    "classify": [{"text": f"the thing {i}", "label": "xy"[i % 2]} for i in range(20)],
    "tag": [{"tokens": ["on", f"it{i}"], "tags": ["O", "NAME"]} for i in range(20)],
    "preference": [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(20)],
}
LEARNED = {
    "text": "trained on 7: 'e thing 0<eos>'",
    "chat": "trained on 3: 'a0<eos>'",
    "pair": "trained on 5: 'it 0<eos>'",
    "classify": "learned: the class x",
    "tag": "NAME",
    "preference": "rejected:",
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    model_folder(tmp_path / "model")
    for kind, rows in KINDS.items():
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command(files: Path, kind: str, *words: str, code: int = 0, model: str = "model") -> str:
    data = str(files / f"{kind}.jsonl")
    return run(
        "preprocess", "--model", str(files / model), "--train-data", data, "--eval-data", data, "--max-length", "40", *words, code=code
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_is_shown_token_by_token(files: Path, kind: str) -> None:
    said = command(files, kind, "--debug", "--num", "2")
    assert f"{kind}.jsonl" in said
    assert "train: 20 samples from 20 rows" in said
    assert "tokens a sample" in said
    assert LEARNED[kind] in said
    assert len(re.findall(r"── train row (\d+)", said)) == 2
    assert "\x1b" not in said


def test_an_encoder_decoder_s_rows_are_shown_on_both_sides(files: Path) -> None:
    tiny_model("t5", vocab_size=286).save_pretrained(files / "t5")
    tiny_tokenizer().save_pretrained(files / "t5")
    said = command(files, "pair", "--debug", "--num", "1", model="t5")
    assert "input:" in said
    assert "target:" in said
    assert "5 tokens, trained on 5: 'it 0<eos>'" in said
    assert "samples are padded, not packed: it is an encoder-decoder" in said


def test_rows_are_paged(files: Path) -> None:
    said = command(files, "pair", "--debug", "--num", "2", "--row", "19", "--side", "eval")
    assert re.findall(r"── eval row (\d+)", said) == ["19", "20"]
    assert "'it 18<eos>'" in said
    assert "pair.jsonl, line 19" in said
    assert "there is no row 21: train has 20" in command(files, "pair", "--debug", "--row", "21", code=2)
    assert "── " not in command(files, "pair")
    assert "choose train or eval" in command(files, "pair", "--side", "both", code=2)


def test_color_is_used_on_a_terminal_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    said = command(files, "pair", "--debug", "--num", "1")
    assert re.search(r"\x1b\[32m ?i\x1b", said)  # trained on: green
    assert re.search(r"\x1b\[2;31mo", said)  # ignored: dim red
    assert "[i](" not in said
    monkeypatch.setenv("NO_COLOR", "1")
    said = command(files, "pair", "--debug", "--num", "1")
    assert "\x1b[32m" not in said
    assert "[i](" in said
    assert "[<eos>*](1)" in said


def test_what_is_said_is_what_training_will_do(files: Path) -> None:
    """The same account as the dry run of `train`, which loads the model."""
    said = command(files, "chat")
    keys = {
        "model": str(files / "model"),
        "train_data": str(files / "chat.jsonl"),
        "eval_data": str(files / "chat.jsonl"),
        "max_length": 40,
    }
    for line in dry_run(make_config(keys)).accounts:
        assert line in said


def test_the_cache_is_filled(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "LARGE", 5)
    monkeypatch.setenv("LORAKIT_CACHE", str(files / "cache"))
    said = command(files, "text")
    assert re.search(rf"^tokenized in [0-9.]+ s, and kept in the cache, {files / 'cache' / 'tokens'}$", said, re.MULTILINE)
    assert len([f for f in (files / "cache" / "tokens").iterdir() if f.is_dir()]) == 1
    assert f"found in the cache, {files / 'cache' / 'tokens'}, in " in command(files, "text")
    monkeypatch.setenv("LORAKIT_CACHE", "off")
    assert "s; the cache is off" in command(files, "text")


def test_what_looks_wrong_is_noted(files: Path) -> None:
    bare = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    assert "note: in 20 of 20 chats no learned turn is closed by <eos>" in command(files, "chat", "--chat-template", bare)
    assert "note: max_length=900 is more than the 256 positions" in command(files, "text", "--max-length", "900")
    said = command(files, "pair", "--max-length", "6", "--debug")
    assert "note: 20 of 20 rows are longer than max_length=6, and lose their ends; raise it" in said


def test_a_row_of_which_nothing_is_learned_says_so(files: Path) -> None:
    rows = [*KINDS["pair"][:3], {"prompt": "a" * 60, "completion": "b"}]
    (files / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command(files, "long", "--debug", "--row", "4", "--num", "1")
    assert "no sample: none of the 1 rows has a trained token within max_length=40" in said
    assert "1 dropped, no trained token left" in said


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_one_line(files: Path) -> None:
    tiny_model("llama", vocab_size=90).save_pretrained(files / "small")
    tiny_tokenizer().save_pretrained(files / "small")
    said = command(files, "text", code=2, model="small")
    assert "has 90 rows: they do not belong together" in said.replace("\n", " ")


def test_tasks_in_sequence_are_shown_one_by_one(files: Path) -> None:
    data = str(files / "text.jsonl")
    said = run("preprocess", "--model", str(files / "model"), "--train-data", data, "--train-data", data, "--debug", "--num", "1")
    assert len(re.findall(r"^train: \d+ samples", said, re.MULTILINE)) == 2
    assert re.search(r"^ ?train 2", said, re.MULTILINE)


def test_of_a_long_text_only_the_first_samples_are_shown(files: Path) -> None:
    (files / "long.jsonl").write_text("".join(json.dumps({"text": f"thing {i} " * 90}) + "\n" for i in range(2)))
    said = command(files, "long", "--debug", "--num", "1")
    assert said.count("   sample ") == 3
    assert re.search(r"… and \d+ more samples of this row", said)


def test_feedback_is_shown_with_another_prompts_answer(files: Path) -> None:
    rows = [{"prompt": f"q{i // 2}", "completion": f"answer{i}", "label": i % 2 == 0} for i in range(8)]
    (files / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command(files, "feedback", "--debug", "--num", "8")
    learned = re.findall(r"trained on \d+: '(.*?)<eos>'", said)
    assert learned == [word for i in range(8) for word in (f"answer{i}", f"answer{(i // 2 * 2 + 2) % 8}")]
