"""The modules that PEFT adapts where nobody names any, by model type (peft 0.21, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)."""

from typing import Any

from lorakit.core.errors import BadParameter

_QV = (
    "bart",
    "opt",
    "gptj",
    "gpt_neo",
    "llama",
    "llama4",
    "mistral",
    "mixtral",
    "stablelm",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
)
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_QV, ("q_proj", "v_proj")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon"), ("query_key_value",)),
    "t5": ("q", "v"), "mt5": ("q", "v"), "gpt2": ("c_attn",), "gpt_bigcode": ("c_attn",), "codegen": ("qkv_proj",), "mpt": ("Wqkv",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"), "deberta-v2": ("query_proj", "value_proj"), "deberta": ("in_proj",),
}  # fmt: skip


def default_targets(model: str, key: str) -> Any:
    """The sites of a model for which none were named. Raises BadParameter where PEFT would, naming `key`."""
    from lorakit.train.model_facts import facts_of

    kind = facts_of(model).model_type
    if kind not in TARGETS:
        raise BadParameter(f"PEFT has no default modules for a model of type {kind}; give {key}, e.g. all-linear")
    return list(TARGETS[kind])
