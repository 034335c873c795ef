"""What users get wrong, and what is wrong with what they got: each is one line, exit code 2, and nothing left behind.

The first part is the grievance table of people who fine-tune, as far as it can be caught; the rest is what files and flags may hold.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import lorakit
from lorakit.cli.main import app
from lorakit.data.tiny import tiny_model
from tests.train.runs import class_file, model_folder, text_file

CHAT = [{"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("base") / "model")


def refused(*words: str) -> str:
    """What the command says; it must be one line and exit code 2."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line]
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines), result.stderr
    return lines[-1]


def rows_file(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def trained(tmp_path: Path, model: str) -> Callable[..., str]:
    """`lorakit train` with these flags on the tiny model: its error. No output folder may be left."""

    def train(*words: str, data: str | None = None) -> str:
        out = tmp_path / "out"
        data = data or text_file(tmp_path / "data.jsonl")
        base = [] if "--model" in words else ["--model", model]
        error = refused(
            "train", *words, *base, "--train-data", data, "--output-dir", str(out), "--max-steps", "1", "--max-length", "32", "--quiet"
        )
        assert not out.exists(), sorted(out.rglob("*"))
        return error

    return train


# -- what people complain about -----------------------------------------------------------------------------------------------


def test_a_misspelled_module_is_an_error_even_where_others_match(trained):
    """peft#1959, #3554: skipped silently."""
    assert "Did you mean 'q_proj'" in trained("--sites", "[q_prj, v_proj]")


def test_a_regular_expression_that_matches_nothing_is_an_error(trained):
    """peft#1206, #1024: list or pattern."""
    assert "re:.*q_prj" in trained("--sites", "re:.*q_prj")


def test_a_run_is_not_written_over(tmp_path, model):
    """transformers#35850: a resumed run that starts anew."""
    data, out = text_file(tmp_path / "data.jsonl"), tmp_path / "out"
    words = ["train", "--model", model, "--train-data", data, "--output-dir", str(out), "--max-length", "32", "--quiet", "--max-steps", "1"]
    assert CliRunner().invoke(app, words).exit_code == 0
    before = (out / "run.json").read_bytes()
    assert "--resume auto" in refused(*words)
    assert "learning_rate" in refused(*words, "--resume", "auto", "--learning-rate", "1e-5")
    assert (out / "run.json").read_bytes() == before


def test_an_adapter_of_another_base_is_refused(tmp_path, model):
    """peft#1035, unsloth#869: merged into the wrong base, the model is garbage."""
    other = model_folder(tmp_path / "other", seed=1)
    adapted = lorakit.attach(transformers.AutoModelForCausalLM.from_pretrained(other), lorakit.get_method("lora", r=2))
    adapted.save(tmp_path / "adapter")
    error = refused("merge", str(tmp_path / "adapter"), "--model", model, "--out", str(tmp_path / "merged"))
    assert "was trained on other" in error
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_says_why(tmp_path, model):
    """peft#2105: merging that changes what the model says."""
    adapted = lorakit.attach(tiny_of(model), lorakit.get_method("prefix", tokens=2))
    adapted.meta = {"model": model, "task": "causal-lm"}
    adapted.save(tmp_path / "adapter")
    assert "cannot be merged" in refused("merge", str(tmp_path / "adapter"), "--model", model, "--out", str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def tiny_of(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_pickles_are_refused(tmp_path, model):
    """peft's adapter_model.bin runs whatever it holds."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    assert "safetensors" in refused("inspect", str(tmp_path / "adapter"), "--model", model)


def test_an_adapter_that_was_not_copied_whole_says_what_is_missing(tmp_path, model):
    adapted = lorakit.attach(tiny_of(model), lorakit.get_method("lora", r=2))
    adapted.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter.safetensors").unlink()
    assert "not copied whole" in refused("inspect", str(tmp_path / "adapter"))


def test_a_rank_larger_than_the_matrix_is_an_error(trained):
    assert "r=64" in trained("--r", "64")


def test_a_method_that_nobody_knows_names_the_nearest(trained):
    """unsloth#1385: which methods can I use?"""
    assert "'adalora'" in trained("--method", "adalorra")


def test_a_head_for_other_labels_is_replaced_and_nothing_else(tmp_path):
    """A classifier of three labels, data of two; and an embedding that is not what config.json says."""
    folder, data = model_folder(tmp_path / "bert", "bert", task="sequence-classification", num_labels=3), class_file(tmp_path / "c.jsonl")
    words = ["train", "--model", folder, "--train-data", data, "--max-steps", "1", "--max-length", "32", "--quiet", "--output-dir"]
    assert CliRunner().invoke(app, [*words, str(tmp_path / "out")]).exit_code == 0
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))
    assert "another shape" in refused(*words, str(tmp_path / "other"))


# -- configurations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "line 1"),
        ("a: b: c", "line 1"),
        ("- a\n- b\n", "holds a list"),
        ("learning_rate: 1e-4\nlearning_rate: 2e-4\n", "twice"),
        ("\tmodel: x", "line 1"),
        ('{"model": "x",}x', "line 1"),
        ("learning_rate: .nan", "learning_rate"),
        ("learning_rate: -1", "learning_rate"),
        ("learning_rate: 1e9", "learning_rate"),
        ("warmup_ratio: 2", "warmup_ratio"),
        ("max_length: 1", "max_length"),
        ("max_length: many", "max_length"),
        ("beta: 0", "beta"),
        ("eval_fraction: 1.5", "eval_fraction"),
        ("dropout: 1.5", "dropout"),
        ("task: sft-please", "task"),
        ("lora_rank: 8\nr: 4\n", "lora_rank"),
        ("a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b]\n", "'a'"),
    ],
)
def test_a_configuration_that_is_wrong(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    error = refused("train", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "out"))
    assert expected in error and not (tmp_path / "out").exists(), error


def test_a_configuration_that_is_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(bytes(range(256)) * 8)
    assert "run.yaml" in refused("train", str(tmp_path / "run.yaml"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("flag", ["--device", "--fp16", "--load-in-8bit"])
def test_what_only_a_gpu_can_do_is_refused_where_there_is_none(trained, flag):
    value = {"--device": "cuda", "--fp16": "true", "--load-in-8bit": "true"}[flag]
    error = trained(flag, value)
    assert "unknown key" not in error or "device" in error, error


# -- data ---------------------------------------------------------------------------------------------------------------------


def test_labels_without_variety(trained, tmp_path):
    data = rows_file(tmp_path / "one.jsonl", [{"text": f"text {i}", "label": "a"} for i in range(20)])
    assert "label" in trained(data=data)


def test_mixed_formats(trained, tmp_path):
    chat, classes = rows_file(tmp_path / "chat.jsonl", CHAT), class_file(tmp_path / "classes.jsonl")
    error = trained(data=json.dumps({chat: 1, classes: 1}))
    assert "chat.jsonl" in error and "classes.jsonl" in error
    assert "weight" in trained(data=json.dumps({chat: -1, classes: 1}))
    mixed = rows_file(tmp_path / "mixed.jsonl", [CHAT[0], {"text": "a text"}, CHAT[1]])
    assert "line 2" in trained(data=mixed)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for", "chat template"),
        ("{{ raise_exception('no') }}", "chat template"),
        ("no/such/file.jinja", "chat_template"),
        ("{{ messages[0]['content'] }}", "template"),
        ("{{ messages.__class__.__mro__ }}", "chat template"),
    ],
)
def test_a_wrong_template(trained, tmp_path, template, expected):
    error = trained("--chat-template", template, data=rows_file(tmp_path / "chat.jsonl", CHAT))
    assert expected in error, error


def test_a_vocabulary_that_does_not_fit(trained, tmp_path, model):
    """Ids beyond the embedding are an index error on a CPU and garbage on a GPU."""
    folder = tmp_path / "small"
    shutil.copytree(model, folder)
    tiny_model("llama", vocab_size=100).save_pretrained(folder)
    assert "vocabulary" in trained("--model", str(folder))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "twice"),
        ("a.jsonl", b'{"text": "\xff"}\n', "UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "JSON"),
        ("a.csv", b"text,text\na,b\n", "text"),
        ("a.csv", b"text,label\n", "a.csv"),
        ("a.csv", b"text,label\na\n", "line 2"),
        ("a.parquet", b"PAR1 no parquet", "a.parquet"),
        ("a.arrow", b"ARROW1 no arrow", "a.arrow"),
        ("a.xlsx", b"PK", "xlsx"),
        ("a.jsonl", b'{"question_": "a", "reply": "b"}\n', "columns"),
    ],
)
def test_data_that_cannot_be_used_names_the_place(trained, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in trained(data=str(tmp_path / name))


def test_bad_rows_can_be_left_out(tmp_path, model):
    rows: list[Any] = [{"text": f"text number {i} with words"} for i in range(30)]
    rows[3], rows[7] = {"text": 7}, {"nothing": 0}
    data = rows_file(tmp_path / "rows.jsonl", rows)
    words = ["preprocess", "--model", model, "--train-data", data, "--max-length", "32"]
    assert "line 4" in refused(*words)
    shown = CliRunner().invoke(app, [*words, "--skip-bad"])
    assert shown.exit_code == 0 and "line 4" in shown.output and "line 8" in shown.output
