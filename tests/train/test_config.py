"""One configuration from many places: ranges, types, unknown names, and what decides over what."""

from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import BadParameter
from lorakit.train.chat_templates import TEMPLATES
from lorakit.train.config import FIELDS, FREE, TrainConfig, load_config, make_config, read_config, resolve_config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rate": 100}, r"learning_rate=100: expected at most 10 \(peak rate"),
        ({"learning_rate": 0}, "learning_rate=0: expected more than 0 "),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": "nan"}, "alpha='nan': expected a finite number"),
        ({"method_args": {"alpha": "-Inf"}}, "alpha='-Inf': expected a finite number"),
        ({"learning_rate": "nan"}, "learning_rate='nan': expected a finite number"),
        ({"learning_rate": True}, "learning_rate=true: expected a number"),
        ({"max_length": True}, "max_length=true: expected a number"),
        ({"max_length": 8.5}, "max_length=8.5: expected an integer "),
        ({"eval_fraction": 1}, "eval_fraction=1: expected less than 1 "),
        ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1"),
        ({"max_steps": -5}, "max_steps=-5: expected at least -1 "),
        ({"dtype": "float16"}, "dtype='float16': expected 'float32' or 'bfloat16'. Did you mean 'bfloat16'. "),
        ({"train_data": {"a": "much"}}, r"train_data\.a='much': expected a number \("),
        ({"train_data": {"a": -1}}, r"train_data\.a=-1: expected more than 0 \("),
        ({"train_data": ["a", 2]}, r"train_data\[2\]=2: expected text \("),
        ({"train_data": 5}, r"train_data=5: expected text or a list or a mapping \{key: value\} \("),
        ({"columns": "text"}, r"columns='text': expected a mapping.*default \{\}"),
        ({"max_length": "many"}, r"max_length='many': expected an integer \(longest"),
        ({"max_train_samples": "x"}, r"max_train_samples='x': expected an integer \("),
        ({"packing": "maybe"}, "packing='maybe': expected true or false "),
        ({"torch_compile": "x"}, "torch_compile='x': expected 'auto' or true or false "),
        ({"resume": "true"}, r"resume='true': expected 'auto' \("),
        ({"data_format": "classification"}, "expected 'auto', 'text', .* Did you mean 'classify'"),
        ({"batch_size": 8}, "or per_device_train_batch_size"),
        ({"method": 3}, "method=3 is no name"),
        ({"method": ["lora"]}, "is no name"),
        ({"method_args": [1]}, "is no mapping"),
        ({"r": "many"}, "r='many': expected an integer$"),
        ({"model": None}, "model=None"),
        ({"run_name": {"a": 1}}, "run_name="),
        ({"lr": 1e-4}, "unknown key 'lr' .method lora.. Did you mean 'learning_rate'"),
        ({"device": "cuda"}, "CUDA_VISIBLE_DEVICES"),
        ({"learnin_rate": 1e-4}, "Did you mean 'learning_rate'"),
        ({"micro_batch_siz": 1}, "Did you mean 'micro_batch_size' .axolotl's"),
        ({"zzz": 1}, "lorakit train --keys lists them"),
        ({"fp16": True}, "use bf16: true"),
        ({"preset": 3}, "is no name"),
        ({"preset": "lama"}, "no preset is called 'lama'. Did you mean 'llama'"),
    ],
)
def test_what_is_wrong_is_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message) as caught:
        make_config(keys)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_numbers_may_be_in_quotes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nr: '4'\nmax_length: '64'\nalpha: 1.6e1\n")
    got = read_config(file, {"weight_decay": "1e-2"})
    assert (got.learning_rate, got.weight_decay, got.max_length, got.method_args) == (1e-4, 1e-2, 64, {"r": 4, "alpha": 16.0})


def test_flags_over_file_over_preset_over_dialect_over_ours(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: bundled\ndataset_name: x.jsonl\nuse_peft: true\nwarmup_ratio: 0.5\n")
    assert load_config(file, {}).config.learning_rate == 2e-5, "TRL's"
    got = load_config(file, {"preset": "llama", "max_length": 99}).config
    assert got.learning_rate == 2e-4, "the preset was asked for, TRL's default was not"
    assert (got.warmup_ratio, got.max_length, got.seed, got.max_grad_norm) == (0.5, 99, 42, 1.0)
    assert got.method_args["sites"] == "all-linear"


def test_a_preset_is_none_of_a_runs_keys() -> None:
    got = resolve_config({}, {"preset": "auto", "learning_rate": 1.0})
    assert "preset" not in TrainConfig.model_fields
    assert got.config.learning_rate == 1.0 and got.config.max_length == 512
    assert len(got.notes) == 1 and got.notes[0].startswith("preset bundled: dtype float32")


def test_a_template_by_name_is_its_text() -> None:
    assert make_config({"chat_template": "chatml"}).chat_template == TEMPLATES["chatml"]
    assert make_config({"chat_template": "my.jinja"}).chat_template == "my.jinja"


def test_our_own_keys_need_no_notes() -> None:
    assert resolve_config({"model": "x", "r": 8}, {"learning_rate": 1e-3}).notes == ()
    assert set(FREE) <= set(FIELDS)
