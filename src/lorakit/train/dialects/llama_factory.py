"""LLaMA-Factory's keys: one flat YAML of model, method, data and Transformers' training arguments.

Its data sets are named in `dataset_dir`/dataset_info.json, which says for each where it lies, whether it is alpaca or sharegpt, and
what its columns are called.
"""

import json
import os
from pathlib import Path
from typing import Any

from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.train.dialects.rule import Dialect, Draft, Idle, Joint, Only, To, is_number, number, plain, show, words
from lorakit.train.dialects.shared import (
    CACHE,
    CODE,
    HF_DEFAULTS,
    TRAINING,
    Source,
    choose_method,
    four_bits,
    hold_out,
    hub_or_file,
    loraplus,
    named_template,
    precision,
    put_sources,
    settle_training,
    sites_of,
)

ATTENTION = "attention is chosen by itself: packed documents never see each other"
MEDIA = "models of text alone are trained"
FREEZE = "weights are trained by a method: name one of lorakit list, or unfreeze: [modules]"


def settle(draft: Draft) -> None:
    """What hangs together: stage, method, data, precision."""
    settle_training(draft)
    _stage(draft)
    _method(draft)
    _data(draft)
    precision(draft)
    if (template := draft.get("template")) is not None:
        named_template(draft, "template", str(template), keep_own=True)
    if draft.get("plot_loss"):
        draft.without_effect("plot_loss", "curve.png is always drawn")
    if draft.get("disable_gradient_checkpointing") is True:
        draft.put("gradient_checkpointing", False, "disable_gradient_checkpointing")


def _stage(draft: Draft) -> None:
    stage = draft.get("stage", "sft")
    known = {"sft": "causal-lm", "pt": "causal-lm", "dpo": "dpo", "kto": "kto"}
    if stage not in known:
        raise draft.refuse("stage", "choose sft, pt, dpo or kto")
    if "stage" in draft.given:
        draft.put("task", known[stage], "stage")
    if (loss := draft.get("pref_loss", "sigmoid")) != "sigmoid":
        raise draft.refuse("pref_loss", f"preferences are learned by DPO (sigmoid) or KTO (stage: kto), not by {loss}")
    if (kind := draft.get("finetuning_type", "lora")) != "lora":
        other = "oft" if kind == "oft" else "full weights"
        raise draft.refuse("finetuning_type", f"{other} are no method of lorakit; use lora, or another of lorakit list (method: bitfit)")
    if stage != "pt" and "packing" not in draft.given and not draft.get("neat_packing"):
        draft.default("packing", False)
    if draft.get("neat_packing") is True:
        draft.put("packing", True, "neat_packing")
    if "packing" in draft.given:
        exact = (
            "documents in a window do not see each other, as in neat_packing"
            if draft.get("packing") and not draft.get("neat_packing")
            else ""
        )
        draft.put("packing", draft.get("packing"), "packing", why=exact)
    if draft.get("train_on_prompt") is True:
        draft.put("train_on", "all", "train_on_prompt")
    if draft.get("mask_history") is True:
        draft.put("train_on", "last", "mask_history")


def _method(draft: Draft) -> None:
    parts: list[tuple[str, str]] = []
    args: dict[str, tuple[Any, str]] = {}
    if draft.get("pissa_init") is True:
        parts.append(("pissa", "pissa_init"))
        iterations = int(number(draft, "pissa_iter")) if "pissa_iter" in draft.given else 16
        args["niter"] = (max(iterations, 0), "pissa_iter" if "pissa_iter" in draft.given else "pissa_init")
    parts += [(name, "double_quantization") for name in _quantized(draft)]
    for key, method in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if draft.get(key) is True:
            parts.append((method, key))
    loraplus(draft, parts, args)
    if "lora_target" in draft.given:
        args["sites"] = (sites_of(draft.get("lora_target")), "lora_target")
    if "additional_target" in draft.given:
        args["unfreeze"] = (words(draft.get("additional_target")), "additional_target")
    r = plain(draft.own.get("r", draft.values.get("r", 8)))
    if not is_number(r):
        raise BadParameter(f"lora_rank {show(r)} is no number")
    choose_method(draft, parts, args, {"r": 8, "alpha": 2.0 * r, "dropout": 0.0, "sites": "all-linear"})


def _quantized(draft: Draft) -> list[str]:
    """Sets the base's storage, and names the method that brings it where only a method can say how."""
    bits = draft.get("quantization_bit")
    if bits is None:
        return []
    if bits != 4:
        raise draft.refuse("quantization_bit", "the base is stored in 4 bits (quantize: nf4) or as it is")
    if draft.get("quantization_method", "bnb") not in ("bnb", "bitsandbytes", "nf4"):
        raise draft.refuse("quantization_method", "the base is stored in NF4, as bnb does; use bnb")
    if draft.get("quantization_type", "nf4") != "nf4":
        raise draft.refuse("quantization_type", "use nf4")
    nested = draft.get("double_quantization", True) is True
    methods: list[str] = []
    four_bits(draft, "quantization_bit" if nested else "double_quantization", nested=nested, method=methods)
    return methods


def _data(draft: Draft) -> None:
    sources = []
    if "dataset" in draft.given:
        sources = read_info(draft, "dataset")
        strategy = draft.get("mix_strategy", "concat")
        named = {
            "concat": "passes",
            "interleave_under": "under",
            "interleave_over": "over",
            "passes": "passes",
            "under": "under",
            "over": "over",
        }
        if strategy not in named:
            raise draft.refuse("mix_strategy", "choose concat, interleave_under or interleave_over")
        if "mix_strategy" in draft.given:
            draft.put("mix_strategy", named[strategy], "mix_strategy")
        if "interleave_probs" in draft.given:
            shares = [plain(word) for word in words(draft.get("interleave_probs"))]
            if any(isinstance(share, bool) or not isinstance(share, int | float) for share in shares):
                raise BadParameter(f"interleave_probs: {show(draft.get('interleave_probs'))} are no numbers; expected e.g. 0.3,0.7")
            if len(shares) != len(sources):
                raise BadParameter(f"interleave_probs gives {len(shares)} shares for {len(sources)} data sets; give one for each")
            sources = [Source(s.path, s.format, s.columns, share) for s, share in zip(sources, shares, strict=True)]
        put_sources(draft, sources, "dataset")
    elif "mix_strategy" in draft.given:
        draft.put("mix_strategy", str(draft.get("mix_strategy")).removeprefix("interleave_").replace("concat", "passes"), "mix_strategy")
    if "max_samples" in draft.given:
        n = int(number(draft, "max_samples"))
        why = f"the first of the mixture; LLaMA-Factory takes {n} of each" if len(sources) > 1 else ""
        draft.put("max_train_samples", n * max(len(sources), 1), "max_samples", why=why)
    held = read_info(draft, "eval_dataset") if "eval_dataset" in draft.given else []
    if len(held) > 1:
        raise draft.refuse("eval_dataset", "one source is held out; join the files, or name one")
    fraction = number(draft, "val_size") if "val_size" in draft.given else 0.0
    hold_out(draft, "val_size", fraction, held=held[0] if held else None, said="eval_dataset")
    if "max_samples" in draft.given and "max_eval_samples" not in draft.values and held:
        draft.values["max_eval_samples"] = int(number(draft, "max_samples"))


def read_info(draft: Draft, key: str) -> list[Source]:
    """The data sets named by `dataset` or `eval_dataset`, as dataset_info.json describes them. Raises BadParameter."""
    folder = Path(os.path.expanduser(str(draft.get("dataset_dir", "data"))))
    file = folder / "dataset_info.json"
    info: dict[str, Any] = {}
    if os.path.exists(file):
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadParameter(f"cannot read {file}: {str(error).splitlines()[0]}") from None
        if not isinstance(info, dict):
            raise BadParameter(f"{file} holds no mapping; expected {{name: {{file_name: …}}}}")
    sources = []
    for name in words(draft.get(key)):
        if name in info:
            sources.append(_entry(draft, key, name, info[name], folder))
        elif (path := next((p for p in (Path(os.path.expanduser(name)), folder / name) if os.path.exists(p)), None)) is not None:
            sources.append(Source(str(path)))  # a file where a name is expected: what somebody types who tries
        elif name.startswith(("hf:", "builtin:")) or draft.get("dataset_dir") == "ONLINE":
            sources.append(Source(hub_or_file(name)))
        else:
            hint = did_you_mean(name, info) if info else f"There is no {file}; give its folder as dataset_dir, or a file as {key}."
            raise BadParameter(f"{key}: no data set is called {name!r} in {file}. {hint}")
    return sources


_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"},
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}
"""Their name of a column: what it is called if nothing is said, which is also what we call it."""
_ENTRY = (
    "file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_sha1", "formatting", "ranking", "subset",
    "split", "folder", "num_samples", "columns", "tags",
)  # fmt: skip
_NAMED = ("chosen", "rejected", "kto_tag", "images", "videos", "audios", *_COLUMNS["alpaca"], *_COLUMNS["sharegpt"])
_ROLES = {
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "system_tag": ("system",),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
}  # fmt: skip


def _entry(draft: Draft, key: str, name: str, entry: Any, folder: Path) -> Source:
    where = f"dataset_info.json: {name}"
    if not isinstance(entry, dict):
        raise BadParameter(f"{where} is {show(entry)}; expected {{file_name: …}}")
    for odd in ("script_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "folder"):
        if entry.get(odd) and not entry.get("file_name") and not entry.get("hf_hub_url"):
            raise BadParameter(f"{where}: {odd} is not read; give file_name or hf_hub_url")
    if entry.get("num_samples"):
        raise BadParameter(f"{where}: num_samples draws rows at random; leave it out and give max_train_samples")
    if entry.get("split", "train") != "train":
        raise BadParameter(f"{where}: split {entry['split']} is not read; save it as a file of its own and give file_name")
    if entry.get("hf_hub_url"):
        path = hub_or_file(str(entry["hf_hub_url"]), entry.get("subset"))
    elif entry.get("file_name"):
        path = str(folder / str(entry["file_name"]))
    else:
        raise BadParameter(f"{where} has neither file_name nor hf_hub_url; it has {', '.join(map(str, entry)) or 'nothing'}")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for what, found in (("columns", columns), ("tags", tags)):
        if not isinstance(found, dict) or not all(
            isinstance(name, str) for name in (*found, *(v for v in found.values() if v is not None))
        ):
            raise BadParameter(f"{where}: {what} is {show(found)}; expected a mapping of names")
    for what, found, known in (("", entry, _ENTRY), ("columns: ", columns, _NAMED), ("tags: ", tags, ("role_tag", "content_tag", *_ROLES))):
        for odd in found:
            if odd not in known:
                raise BadParameter(f"{where}: {what}{odd!r} is unknown. {did_you_mean(str(odd), known)}".rstrip())
    if any(columns.get(odd) for odd in ("images", "videos", "audios")):
        raise BadParameter(f"{where} has images, videos or audio; {MEDIA}")
    kind = entry.get("formatting", "alpaca")
    if not isinstance(kind, str) or kind not in _COLUMNS:
        raise BadParameter(f"{where}: formatting {show(kind)} is unknown; choose alpaca or sharegpt")
    ranking = bool(entry.get("ranking")) or draft.get("stage") in ("dpo", "rm")
    return Source(path, *_shape(where, kind, columns, tags, ranking, draft.get("stage") == "pt"))


def _shape(where: str, kind: str, columns: dict[str, Any], tags: dict[str, Any], ranking: bool, text: bool) -> tuple[str, dict[str, str]]:
    """Our format, and the columns whose names differ."""
    if text:
        return "text", {"text": str(columns["prompt"])} if columns.get("prompt", "text") != "text" else {}
    for tag, usual in _ROLES.items():
        if tags.get(tag) is not None and tags[tag] not in usual:
            raise BadParameter(f"{where}: {tag} {tags[tag]} is not known; rename it to {usual[0]} in the file")
    renamed = {ours: str(columns[theirs]) for theirs, ours in _COLUMNS[kind].items() if columns.get(theirs) not in (None, ours)}
    extra = ("chosen", "rejected", "kto_tag")
    renamed |= {ours: str(columns[ours]) for ours in extra if columns.get(ours) not in (None, ours)}
    if kind == "sharegpt":
        names = {ours: tags[tag] for tag, ours in (("role_tag", "role"), ("content_tag", "content")) if tags.get(tag) is not None}
        if names not in ({"role": "from", "content": "value"}, {"role": "role", "content": "content"}):
            renamed |= {ours: str(name) for ours, name in names.items() if name not in ("from", "value", ours)}
        if renamed.get("conversations") == "messages":  # OpenAI's messages by another name
            kind = "chat"
            del renamed["conversations"]
    if "kto_tag" in columns:
        kind = "feedback"
    return "preference" if ranking else kind, renamed


LLAMA_FACTORY = Dialect(
    name="llama_factory",
    title="LLaMA-Factory",
    marks=frozenset({"dataset", "stage", "finetuning_type"}),
    keys=TRAINING
    | {
        "model_name_or_path": To("model"),
        "adapter_name_or_path": To("init_adapter"),
        "lora_rank": To("r"),
        "lora_alpha": To("alpha"),
        "lora_dropout": To("dropout"),
        "lora_target": Joint("sites"),
        "additional_target": Joint("unfreeze"),
        "use_rslora": Joint("method"),
        "use_dora": Joint("method"),
        "pissa_init": Joint("method"),
        "pissa_iter": Joint("niter"),
        "pissa_convert": Idle("a PiSSA adapter is plain LoRA over the untouched base already"),
        "loraplus_lr_ratio": Joint("method ratio"),
        "loraplus_lr_embedding": Joint("embedding_lr"),
        "create_new_adapter": Only((False,), "merge the adapter first: lorakit merge, then train on the result"),
        "quantization_bit": Joint("quantize"),
        "quantization_method": Joint("quantize"),
        "quantization_type": Joint("quantize"),
        "double_quantization": Joint("quantize double_quant"),
        "quantization_device_map": Idle("the base is quantized before it moves to the device"),
        "stage": Joint("task"),
        "finetuning_type": Joint("method"),
        "pref_beta": To("beta"),
        "pref_loss": Joint("task"),
        "pref_ftx": Only((0,), "DPO's loss stands alone; leave it out"),
        "pref_bco_weight": Only((0,), "DPO's loss stands alone; leave it out"),
        "dpo_label_smoothing": Only((0,), "DPO's labels are taken as they are; leave it out"),
        "ld_alpha": Only((), "leave it out"),
        "simpo_gamma": Idle("DPO is trained, not SimPO"),
        "kto_chosen_weight": To("desirable_weight"),
        "kto_rejected_weight": To("undesirable_weight"),
        "ref_model": Only((), "the reference is the same base with the adapter switched off; leave it out"),
        "ref_model_adapters": Only((), "the reference is the same base with the adapter switched off; leave it out"),
        "ref_model_quantization_bit": Idle("the reference is the same base with the adapter switched off"),
        "reward_model": Only((), "reward models are not used; choose stage dpo or kto"),
        "dataset": Joint("train_data data_format columns"),
        "dataset_dir": Joint("train_data"),
        "eval_dataset": Joint("eval_data"),
        "media_dir": Idle(MEDIA),
        "template": Joint("chat_template"),
        "cutoff_len": To("max_length"),
        "max_samples": Joint("max_train_samples"),
        "val_size": Joint("eval_fraction"),
        "eval_on_each_dataset": Only((False,), "one source is held out"),
        "mix_strategy": Joint("mix_strategy"),
        "interleave_probs": Joint("train_data"),
        "packing": Joint("packing"),
        "neat_packing": Joint("packing"),
        "train_on_prompt": Joint("train_on"),
        "mask_history": Joint("train_on"),
        "streaming": Idle("files that are larger than memory are streamed by themselves"),
        "buffer_size": Idle("files that are larger than memory are streamed by themselves"),
        "overwrite_cache": Idle(CACHE),
        "preprocessing_batch_size": Idle(CACHE),
        "tokenized_path": Idle(CACHE),
        "ignore_pad_token_for_loss": Only((True,), "padding is never trained on"),
        "tool_format": Only((), "tools are written as the chat template writes them; leave it out"),
        "disable_shuffling": Only((False,), "the order is random and repeats with the seed"),
        "eval_num_beams": Idle("evaluation is a loss"),
        "compute_accuracy": Idle("evaluation is a loss"),
        "early_stopping_steps": To("early_stopping_patience"),
        "plot_loss": Joint(""),
        "include_effective_tokens_per_second": Idle("tokens are always counted"),
        "pure_bf16": Joint("dtype"),
        "flash_attn": Idle(ATTENTION),
        "shift_attn": Only((False,), "use method: longlora"),
        "rope_scaling": Only((), "put rope_parameters into the model's config.json"),
        "enable_liger_kernel": Idle("the loss is computed by chunks without it"),
        "use_unsloth": Idle("the layers are made fast by lorakit itself"),
        "use_unsloth_gc": Idle("gradient_checkpointing is a key of its own"),
        "use_v1_kernels": Idle("the layers are made fast by lorakit itself"),
        "use_reentrant_gc": Idle("checkpointing is always the non-reentrant one"),
        "disable_gradient_checkpointing": Joint("gradient_checkpointing"),
        "upcast_layernorm": Only((False,), "norms keep the base's dtype; use dtype: float32"),
        "upcast_lmhead_output": Idle("the loss is computed in fp32"),
        "low_cpu_mem_usage": Idle("models are always loaded without a second copy"),
        "use_fast_tokenizer": Only((True,), "tokenizers are the fast ones"),
        "split_special_tokens": Only((False,), "special tokens are not split"),
        "resize_vocab": Only((False,), "an adapted embedding keeps its size; extend the base first"),
        "add_tokens": Only((), "extend the tokenizer and the base first"),
        "add_special_tokens": Only((), "extend the tokenizer and the base first"),
        "model_revision": Only(("main",), "download that revision and give its folder as model"),
        "cache_dir": Idle("models are cached where HF_HOME says"),
        "trust_remote_code": Idle(CODE),
        "hf_hub_token": Idle("the token is read from the environment (HF_TOKEN)"),
        "moe_aux_loss_coef": Only((0,), "the router stays frozen; leave it out"),
        "mixture_of_depths": Only((), "leave it out"),
        "train_from_scratch": Only((False,), "adapters need a trained base"),
        "infer_backend": Idle("it is for inference"),
        "infer_dtype": Idle("it is for inference"),
        **{
            f"export_{name}": Only((), "a finished adapter is merged by lorakit merge ADAPTER --out FOLDER")
            for name in ("dir", "size", "device", "legacy_format", "hub_model_id", "quantization_bit", "quantization_dataset")
        },
        "print_param_status": Idle("--dry-run lists what is trained"),
        "freeze_trainable_layers": Idle(FREEZE),
        "freeze_trainable_modules": Idle(FREEZE),
        "freeze_vision_tower": Idle(MEDIA),
        "freeze_multi_modal_projector": Idle(MEDIA),
        "freeze_language_model": Only((False,), MEDIA),
        "image_max_pixels": Idle(MEDIA),
        "video_max_pixels": Idle(MEDIA),
        **{
            key: Only((False,), "the optimizer is AdamW; a method may bring its own, see lorakit list")
            for key in ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
        },
        "use_dft_loss": Only((False,), "the loss is the plain one"),
        "use_llama_pro": Only((False,), FREEZE),
        "use_swanlab": Idle("trackers are tensorboard and wandb; report.html is always written"),
        "fp8": Only((False,), "use bf16: true"),
    },
    settle=settle,
    defaults=HF_DEFAULTS | {"max_length": 2048},
    source="hparams/{data,finetuning,model}_args.py of LLaMA-Factory, 2026",
)  # fmt: skip
