"""Attention by segments in training: no dense mask for packed windows, a faster backward on the CPU, the model's own attention otherwise.

Transformers asks an attention implementation for two functions. `segment_mask` recognizes causal masks, sliding windows, packed documents
and padding by the functions that Transformers composed them of, and gives the layers `first` [b, t], int32: the first key that each query
sees. Everything else gets the dense mask of sdpa. `segment_attend` computes attention from it by `ops.attention`; where a call asks for
more than that (a cache, dropout, a position bias, attention weights) it is sdpa's.

`segment_attention` switches a model over once the model itself has shown, in a tiny forward and backward, that nothing changes but
rounding. Tokens of padding see themselves alone: their outputs, which nothing reads, are not sdpa's.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.import_utils import is_tracing

from lorakit.data.packable import eval_mode
from lorakit.ops.attention import attention

NAME = "lorakit_segments"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_BEYOND = {"position_bias", "softcap", "s_aux", "cache", "output_attentions"}  # what a call may ask for and only sdpa's function judges
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative to the largest value; another mask changes far more

logger = logging.getLogger(__name__)


def segment_attention(model: nn.Module) -> Callable[[], None]:
    """Let the model compute its attention by segments if that changes nothing but rounding; the undo, which does nothing if it would.

    Decided once, here; the reason against it is logged, and `why_not_segmented` gives it.
    """
    reason = why_not_segmented(model)
    if reason:
        logger.info("%s keeps its own attention: %s", type(model).__name__, reason)
        return lambda: None
    configs = _configs(model)
    _switch(configs, NAME)
    return lambda: _switch(configs, "sdpa")


def why_not_segmented(model: nn.Module) -> str | None:
    """The reason as a clause, or None if attention by segments gives the model's own outputs and gradients. The model is left as it was."""
    found = sorted({str(config._attn_implementation) for config in _configs(model)})
    if found != ["sdpa"]:
        return f"it is computed by {', '.join(found) or 'no function of Transformers'}, and only sdpa is replaced"
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder's, which is not all causal"
    if not getattr(config, "is_causal", True) or not any(getattr(module, "is_causal", False) for module in model.modules()):
        return "it is not causal"
    if dropout := max(float(getattr(c, name, None) or 0) for c in _configs(model) for name in _DROPOUTS):
        return f"it has dropout of {dropout}"
    return _probe(model)


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configurations that the model's modules hold."""
    held = [module.config for module in model.modules() if getattr(module, "config", None) is not None]
    return list({id(c): c for c in held if "_attn_implementation_internal" in vars(c)}.values())


def _switch(configs: list[Any], name: str) -> None:
    for config in configs:
        config._attn_implementation_internal = name  # the property's setter would ask for kernels, and reach shared configs inside


# --- the two functions ----------------------------------------------------------------------------------------------------------


def segment_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """`first` [b, t] where that says it all, None where query i sees the keys 0 to i, else sdpa's dense mask [b, 1, t, s]."""
    square = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    place = torch.arange(q_length, device=device)
    plain = square and not options.get("use_vmap", False) and not is_tracing(place)  # which knows no values of a mask
    parts = _parts(mask_function) if plain else None
    if parts is not None and ("sequences" in parts or options.get("allow_is_causal_skip", True)):
        start = _starts(place.expand(batch_size, -1), parts.get("sequences"), attention_mask)
        window = parts.get("window")
        if start is not None and not (window and torch.device(device).type == "cuda"):  # varlen attention is told segments only
            first = start if window is None else torch.maximum(start, place - window + 1)
            return first.to(torch.int32) if bool(first.any()) else None
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **options)


def _parts(function: Callable[..., Any]) -> dict[str, Any] | None:
    """{sequences: [b, t], numbers of packed documents; window: int} of a causal mask's function; None if it is anything else."""
    if function is causal_mask_function:
        return {}
    name, held = _made_by(function)
    if name != "and_masks" or len(held["mask_functions"]) != 2:
        return None
    (one, with_one), (other, with_other) = (_made_by(f) for f in held["mask_functions"])
    if one == "sliding_window_overlay" and held["mask_functions"][1] is causal_mask_function:
        return {"window": with_one["sliding_window"]}
    if one == "packed_sequence_mask_function" and other == "remap_positions_for_packed_sequence":
        inside = _parts(with_other["mask_function"])
        return None if inside is None or "sequences" in inside else {**inside, "sequences": with_one["packed_sequence_mask"]}
    return None


def _made_by(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """(the function of Transformers' masking_utils that made this mask function, what it closes over); ("", {}) for others."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None or function.__module__ != masking_utils.__name__:
        return "", {}
    return function.__qualname__.partition(".")[0], dict(zip(code.co_freevars, (c.cell_contents for c in cells), strict=True))


def _starts(place: Tensor, sequences: Tensor | None, real: Tensor | None) -> Tensor | None:
    """Where each token's document begins [b, t]; padding is alone. None if a row's tokens have padding between them."""
    if sequences is not None:
        new = sequences.diff(dim=-1, prepend=sequences[:, :1] - 1) != 0
        return (place * new).cummax(-1).values if real is None else None
    if real is None:
        return torch.zeros_like(place)
    if real.shape != place.shape or bool(((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any()):
        return None
    return torch.where(real, real.int().argmax(-1, keepdim=True), place)


def segment_attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention [b, t, h, d] of q [b, h, t, d] and k, v [b, h_kv, s, d] under a mask of `segment_mask`."""
    first = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ours = first is not None or (attention_mask is None and causal and query.shape[2] == key.shape[2] > 1)
    if (
        ours
        and not dropout
        and not _BEYOND & {name for name, x in options.items() if x is not None and x is not False}
        and query.shape[-1] == value.shape[-1]
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if query.device.type == "cpu" and query.dtype in _DTYPES:
            return attention(query, key, value, first, scale=scale).transpose(1, 2), None
        if first is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return _varlen(query, key, value, first, scale), None
    mask = attention_mask if first is None else _dense(first)
    out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
    )
    return out


def _dense(first: Tensor) -> Tensor:
    """sdpa's mask: bool [b, 1, t, t]."""
    place = torch.arange(first.shape[1], device=first.device)
    return (first[:, None, :, None] <= place) & (place <= place[:, None])


def _varlen(query: Tensor, key: Tensor, value: Tensor, first: Tensor, scale: float) -> Tensor:
    """torch's flash attention over segments on a GPU, all rows as one: [b, t, h, d]."""
    from torch.nn.attention.varlen import varlen_attn

    b, t = first.shape
    begins = (first == torch.arange(t, device=first.device)).flatten().nonzero().flatten()
    ends = torch.cat([begins, begins.new_tensor([b * t])]).to(torch.int32)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out: Any = varlen_attn(q, k, v, ends, ends, t, t, scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])
    rows: Tensor = out.unflatten(0, (b, t))
    return rows


AttentionInterface.register(NAME, segment_attend)
AttentionMaskInterface.register(NAME, segment_mask)


# --- the question to the model --------------------------------------------------------------------------------------------------


def _probe(model: nn.Module) -> str | None:
    """Whole rows, a packed window with padding, and padded rows, by both functions, in eval mode."""
    configs = _configs(model)
    with eval_mode(model):
        for what, batch in _batches(model).items():
            try:
                own = _run(model, batch)
                _switch(configs, NAME)
                new = _run(model, batch)
            except Exception as error:  # whatever it is, this model does not take such a mask
                return f"a probe of {what} failed with {type(error).__name__}: {error}"
            finally:
                _switch(configs, "sdpa")
            for part, x, y in zip(("outputs", "gradients"), own, new, strict=True):
                difference = (x - y).abs().max() / x.abs().max()
                if not difference <= _TOLERANCE.get(x.dtype, 5e-2):
                    return f"{part} of {what} would change by {float(difference):.1e} of the largest"
    return None


def _batches(model: nn.Module) -> Mapping[str, dict[str, Any]]:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = torch.tensor([[(7 * i + 3) % embeddings.num_embeddings for i in range(n, n + 13)] for n in (0, 13)], device=device)
    places = torch.tensor([[*range(6), *range(4), 0, 0, 0], [*range(13)]], device=device)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 9:] = False
    padded = ids.where(real, getattr(model.config, "pad_token_id", None) or 0)  # a classifier reads the last token that is no padding
    return {
        "whole rows": {"input_ids": ids, "use_cache": False},
        "packed windows": {"input_ids": ids, "position_ids": places, "use_cache": False},
        "padded rows": {"input_ids": padded, "attention_mask": real.long(), "use_cache": False},
    }


def _run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(outputs of the tokens that are not padding, gradients of their weighted sum at the embeddings)."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(cut)  # type: ignore[operator]
    try:
        with torch.enable_grad():
            logits: Tensor = model(**batch).logits
    finally:
        hook.remove()
    if logits.shape[:2] == batch["input_ids"].shape:
        logits = logits[batch["attention_mask"].bool()] if "attention_mask" in batch else logits
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device, dtype=logits.dtype).sin().view_as(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), leaves[-1:])  # the last: a method may have looked at the base first
    return logits.detach(), gradient
