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
        ({"learning_rate": 100}, "learning_rate=100: Input should be less than or equal to 10 .peak rate"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"learning_rate": True}, "learning_rate=true: expected a number"),
        ({"max_length": True}, "max_length=true: expected a number"),
        ({"max_length": 8.5}, "max_length=8.5: Input should be a valid integer"),
        ({"eval_fraction": 1}, "eval_fraction=1: Input should be less than 1"),
        ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1"),
        ({"max_steps": -5}, "max_steps=-5: Input should be greater than or equal to -1"),
        ({"dtype": "float16"}, "dtype='float16': Input should be 'float32' or 'bfloat16'"),
        ({"train_data": {"a": "much"}}, "train_data"),
        ({"train_data": [1, 2]}, "train_data"),
        ({"columns": "text"}, r"columns='text': .*default \{\}"),
        ({"batch_size": 8}, "or per_device_train_batch_size"),
        ({"method": 3}, "method=3 is no name"),
        ({"method": ["lora"]}, "is no name"),
        ({"method_args": [1]}, "is no mapping"),
        ({"r": "many"}, "r='many' is not int"),
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
