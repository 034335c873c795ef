"""Presets: real keys with reasons, sites that a model of the family has, a template that renders, and nothing over the user's words."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from lorakit.core.errors import BadParameter
from lorakit.core.site import select
from lorakit.data.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from lorakit.train.chat_templates import TEMPLATES
from lorakit.train.config import make_config
from lorakit.train.preset import preset_of, presets, under

SMALL: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "OPT",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": ("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "phi": ("Phi", SMALL | {"pad_token_id": 0}),
    "phi3": ("Phi3", SMALL | {"pad_token_id": 0, "num_key_value_heads": 4}),
    "gemma": ("Gemma", SMALL | {"head_dim": 8, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2", SMALL | {"head_dim": 8, "num_key_value_heads": 2}),
}


def model_of(kind: str) -> Any:
    """A tiny model of a type."""
    if kind in ARCHITECTURES:
        task = "sequence-classification" if kind in ("bert", "roberta") else "causal-lm"
        return tiny_model(kind, task=task)  # type: ignore[arg-type]
    family, keys = OTHERS[kind]
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**keys))


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_configuration_with_reasons(name: str) -> None:
    found = presets()[name]
    assert set(found.values) <= {*make_config({}).model_dump(), "sites"}
    make_config(dict(found.values))
    for line in found.text.splitlines()[1:]:
        assert re.fullmatch(r"\w+: .+  # .+", line), f"{line} gives no reason"
    assert found.values.get("chat_template", "plain") in TEMPLATES


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "gpt_neox", "gpt2", "bert", "roberta", "t5", *OTHERS]
)
def test_its_sites_are_there_and_its_template_renders(kind: str) -> None:
    found = next(p for p in presets().values() if kind in p.model_types)
    assert select(model_of(kind), found.values["sites"])
    if "chat_template" in found.values:
        tokenizer = tiny_tokenizer(chat_template=TEMPLATES[found.values["chat_template"]])
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], tokenize=False)


def test_no_model_type_has_two_presets() -> None:
    types = [kind for found in presets().values() for kind in found.model_types]
    assert len(types) == len(set(types))


def test_auto_goes_by_the_models_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert preset_of(str(tmp_path)).name == "qwen2" and preset_of("bundled").name == "bundled"
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(BadParameter, match="no preset is for models of type abacus"):
        preset_of(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(BadParameter, match="cannot read"):
        preset_of(str(tmp_path))


def test_the_users_words_and_the_tokenizers_template_stay(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    values, notes = under("auto", {"model": str(tmp_path), "learning_rate": 1.0}, {"sites": None})
    assert "learning_rate" not in values and values["chat_template"] == "chatml" and values["sites"] == "all-linear"
    assert notes[0].startswith("preset qwen2: dtype bfloat16, sites all-linear")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    values, _ = under("qwen2", {"model": str(tmp_path)}, {})
    assert "chat_template" not in values and "sites" not in values, "a method without sites gets none"
    values, _ = under("qwen2", {"model": str(tmp_path), "init_adapter": "saved"}, {"sites": None})
    assert "sites" not in values, "a saved adapter has its own"


def test_figures_of_papers_say_that_they_were_not_looked_up() -> None:
    for found in presets().values():
        for line in found.text.splitlines():
            assert "from memory" in line or not re.search(r"arXiv|[Tt]able \d|appendix|section \d", line.partition("#")[2]), line
