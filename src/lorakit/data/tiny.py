"""Tiny models and a tiny tokenizer, made from configurations alone: what every test of the project runs on.

Sizes: hidden 32, 2 layers, 4 heads (2 key-value heads where the architecture groups them), vocabulary 128, no dropout; of 4 experts
2 for each token.
Nothing is fetched and nothing is saved. ASCII text tokenizes to ids below 128, so it fits the models' default vocabulary;
for other bytes build the model with `vocab_size=len(tiny_tokenizer())`.
"""

from typing import Any, Literal

import torch
import transformers

from lorakit.core.errors import DataError

Task = Literal["causal-lm", "masked-lm", "sequence-classification", "token-classification"]

_COMMON = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 256}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2, "initializer_range": 0.15}
_BERT = {**_SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.15}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "GptOss",
        {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    ),
    "gpt_neox": ("GPTNeoX", {**_SHAPE, "initializer_range": 0.15}),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.15,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "bert": ("Bert", _BERT),
    "roberta": ("Roberta", _BERT),
    "t5": (
        "T5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "tie_word_embeddings": True,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
}
_HEADS: dict[str, dict[str, str]] = {
    "causal-lm": {"gpt2": "GPT2LMHeadModel", "bert": "BertLMHeadModel", "t5": "T5ForConditionalGeneration"},
    "masked-lm": {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"},
    "sequence-classification": {},
    "token-classification": {},
}
_SUFFIX = {
    "causal-lm": "ForCausalLM",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}

ARCHITECTURES = tuple(_CONFIGS)


def tiny_model(arch: str, *, task: Task = "causal-lm", seed: int = 0, tied: bool = False, **overrides: Any) -> transformers.PreTrainedModel:
    """A randomly initialized tiny model in eval mode, float32 on CPU; the same seed gives the same bits.

    Args:
        arch: one of `ARCHITECTURES`. Under "causal-lm", t5 is its encoder-decoder with the language-model head.
        task: the head; "masked-lm" exists for bert and roberta only.
        tied: whether the output embedding is the input embedding (only where there is a language-model head); t5 always is.
        overrides: entries of the architecture's configuration, for example `num_labels=5` or `sliding_window=6`.

    No bias is left at zero and no norm at one: a test that forgets one of them must see it.
    The global random state is left as it was found.
    """
    config = _config(arch, task, tied=tied, overrides=overrides)
    cls = getattr(transformers, _class_name(arch, task))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = cls(config)
        _shake_vectors(model)
    model.train(False)
    return model


def _config(arch: str, task: Task, *, tied: bool, overrides: dict[str, Any]) -> transformers.PreTrainedConfig:
    if arch not in _CONFIGS:
        raise DataError(f"no tiny model is called {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    family, shape = _CONFIGS[arch]
    settings = {**_COMMON, "tie_word_embeddings": tied, **shape}
    if task in ("sequence-classification", "token-classification"):
        settings["num_labels"] = 3
    if task == "causal-lm" and arch in ("bert", "roberta"):
        settings["is_decoder"] = True
    config: transformers.PreTrainedConfig = getattr(transformers, f"{family}Config")(**{**settings, **overrides})
    return config


def _class_name(arch: str, task: Task) -> str:
    heads = _HEADS.get(task)
    name = None if heads is None else heads.get(arch) or (_CONFIGS[arch][0] + _SUFFIX[task] if task in _SUFFIX else None)
    if name is None:
        raise DataError(f"tiny_model({arch!r}) has no head for task {task!r}; choose task='causal-lm' or task='sequence-classification'")
    return name


@torch.no_grad()
def _shake_vectors(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("bias"):  # the biases of stacked experts are matrices
            parameter.add_(0.1 * torch.randn_like(parameter))


_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|system|>", "<|user|>", "<|assistant|>")
# A few merges make tokenization depend on the neighbors, as in real tokenizers: "\n\n" and "    " are single tokens.
_MERGES = "t h,i n,e r,o n,a n,r e,s t,Ġ t,Ġ a,Ġ s,Ġt h,Ġth e,in g,Ċ Ċ,Ġ Ġ,ĠĠ ĠĠ,d e,de f,s e,se l,sel f,l o"

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\\n' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 286 entries built in memory: any text round-trips, ASCII text stays below id 128.

    Ids: 0 pad, 1 eos, 2 bos, 3 unk, 4 mask, then the chat roles. The template marks assistant text with `{% generation %}`;
    pass another template, or None for a tokenizer that has none.
    """
    build: Any = transformers.PreTrainedTokenizerFast  # untyped in Transformers
    tokenizer: transformers.PreTrainedTokenizerFast = build(
        tokenizer_object=_byte_level_bpe(), pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", mask_token="<mask>",
        extra_special_tokens=list(_SPECIAL[5:]), chat_template=chat_template, clean_up_tokenization_spaces=False, model_max_length=256,
    )  # fmt: skip
    return tokenizer


def _byte_level_bpe() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [(left, right) for left, right in (pair.split(" ") for pair in _MERGES.split(","))]
    ascii_bytes = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "č", "ĉ"]  # space, newline, return, tab
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(ascii_bytes))
    entries = [*_SPECIAL, *ascii_bytes, *(a + b for a, b in pairs)]
    entries += [f"<unused{i}>" for i in range(128 - len(entries))] + rest
    tokenizer = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer
