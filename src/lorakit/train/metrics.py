"""What is measured: the training loss as an exact sum, and scores of finished predictions. Pure functions.

    loss of a batch = Σ over supervised tokens of −log p(token)    never a mean: sums over uneven batches add up exactly

Scores are plain floats between 0 and 1, perplexity and bits per byte aside.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.core.errors import DataError, Incompatible
from lorakit.core.events import Scored
from lorakit.data.encoded import IGNORED
from lorakit.ops.cross_entropy import head_loss, head_losses
from lorakit.train.head import head_and_hidden

CHUNK = 2**22
"""Logits upcast to fp32 at a time: 16 MB, as memory beyond 32 MB would be fetched anew each time (train/allocator.py)."""


# ------------------------------------------------------------------------------------------------------------------ the loss
def forward_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """(sum of the losses of all supervised labels as an fp32 scalar, their number): `forward_scored` without the logits.

    Where a causal model's logits are its head's very output (train/head.py), they are never whole: the head and the loss go through the
    supervised positions by chunks, gradients included (ops/cross_entropy.py). Then the sum can be differentiated once only.
    """
    inputs, labels = _inputs(model, batch)
    if not _predicts_next(model, labels):
        return _aligned_loss(model, inputs, labels)[:2]
    inputs, targets, n = _ahead(model, inputs, labels)
    found = head_and_hidden(model, inputs)
    if found is None:
        return _token_loss(model(**inputs).logits, targets), n
    head, hidden = found
    _check_places(hidden, targets)
    if targets.dim() == 2 and n < targets[:, 1:].numel():  # its forward takes no logits_to_keep
        hidden, targets = hidden[targets != IGNORED], targets[targets != IGNORED]
    return head_loss(hidden, head, targets), n


def forward_scored(model: nn.Module, batch: Mapping[str, Any]) -> Scored:
    """The summed loss of all supervised labels in fp32, their number, and the logits at them, for any Transformers model with a head.

    Causal models predict the next token: labels are shifted here, and positions whose target is ignored never reach the head
    (Transformers' own `logits_to_keep`). Encoder-decoders, masked models and classifiers have one label per output. Floating-point
    labels are regressed or, with several outputs, classified independently, as the model's configuration says.

    Args:
        model: a Transformers model, adapted or not; called without labels and without a cache.
        batch: its keyword tensors and `labels` ([b, t], [b] or [b, classes]); `kinds` is left out (train/kinds.py).
    """
    inputs, labels = _inputs(model, batch)
    if not _predicts_next(model, labels):
        return _aligned_loss(model, inputs, labels)
    inputs, targets, n = _ahead(model, inputs, labels)
    logits = model(**inputs).logits
    return Scored(_token_loss(logits, targets), n, logits, None if targets.dim() == 1 else targets != IGNORED)


def row_log_probs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """log p of each row's supervised labels together, [b] in at least fp32, for any model that generates: a decoder, where the label at
    t + 1 is predicted at t, or an encoder-decoder. Logits are never whole where the head allows it (see `forward_loss`).
    """
    inputs, labels = _inputs(model, batch)
    if _predicts_next(model, labels):
        kept = F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED
        inputs, targets, _ = _ahead(model, inputs, labels)
        found = head_and_hidden(model, inputs)
    else:
        kept, targets, found = labels != IGNORED, labels, None
        inputs = _decoding(model, inputs, labels)
    outputs = model(**inputs).logits if found is None else found[1]
    _check_places(outputs, targets)
    if targets.dim() == 2:  # a forward that takes no logits_to_keep
        outputs, targets = outputs[kept], targets[kept]
    losses = _each_loss(outputs, targets) if found is None else head_losses(outputs, found[0], targets)
    return -losses.new_zeros(kept.shape).masked_scatter(kept, losses).sum(-1)


def _each_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


ASIDE = frozenset({"labels", "kinds", "desirable"})
"""Keys of a batch that are no arguments of a model: what it is to predict, and what the context or the loss says of its samples."""


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """What the model is called with, and the labels."""
    inputs = {key: value for key, value in batch.items() if key not in ASIDE}
    if "use_cache" in _arguments(type(model).forward):
        inputs["use_cache"] = False
    return inputs, batch["labels"]


def _ahead(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor, int]:
    """The inputs, what each position that reaches the head is to predict ([b, t], or [n] where the model leaves the others out), and n."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = targets != IGNORED
    n = int(kept.sum())
    compiled = model._compiled_call_impl is not None  # its graph would break at a number of rows that the data decide
    if n < targets[:, 1:].numel() and "logits_to_keep" in _arguments(type(model).forward) and not compiled:
        return inputs | {"logits_to_keep": kept}, targets[kept], n
    return inputs, targets, n


def _aligned_loss(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Scored:
    """One label per output: no shift."""
    logits = model(**_decoding(model, inputs, labels)).logits
    if labels.is_floating_point() or logits.shape[-1] == 1:
        return Scored(_value_loss(model, logits, labels), labels.numel(), logits, None)
    kept = labels != IGNORED
    return Scored(_token_loss(logits, labels), int(kept.sum()), logits, kept)


def _decoding(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """With what the decoder of a model that generates reads: the labels, one place later. One with classes makes its own."""
    if not model.config.is_encoder_decoder or not model.can_generate() or "decoder_input_ids" in inputs:  # type: ignore[operator, union-attr]
        return inputs
    return inputs | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}  # type: ignore[operator]


def _value_loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error for regression, independent logistic losses for several labels at once; the default is Transformers' own."""
    config: Any = model.config
    kind = config.problem_type or ("regression" if logits.shape[-1] == 1 else "multi_label_classification")
    return _VALUE_LOSSES[kind](logits.float().view(labels.shape), labels.float(), reduction="sum")


_VALUE_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "regression": F.mse_loss,
    "multi_label_classification": F.binary_cross_entropy_with_logits,
}


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    _check_places(logits, targets)
    return cross_entropy_sum(logits.flatten(0, -2), targets.flatten())


def _check_places(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape[:-1] != targets.shape:
        raise Incompatible(f"the model returned logits for {tuple(outputs.shape[:-1])} positions, its labels are {tuple(targets.shape)}")


def cross_entropy_sum(logits: Tensor, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Σ −log softmax(logits)[target] in fp32: logits [n, v], targets [n], scalar. Ignored targets add nothing.

    Large logits go through in chunks of `chunk` values whose fp32 copy is made again for backward instead of being kept.
    """
    rows = max(1, chunk // logits.shape[-1])
    if len(targets) <= rows:
        return _cross_entropy(logits, targets)
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    losses: list[Tensor] = [checkpoint(_cross_entropy, z, y, use_reentrant=False, preserve_rng_state=False) for z, y in parts]
    return torch.stack(losses).sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")


def _predicts_next(model: nn.Module, labels: Tensor) -> bool:
    """A model that generates and has no encoder beside it: its logits at t are about token t + 1."""
    return not labels.is_floating_point() and bool(model.can_generate()) and not model.config.is_encoder_decoder  # type: ignore[operator, union-attr]


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


# ---------------------------------------------------------------------------------------------------------------- the scores
def bits_per_byte(nats: float, n_bytes: int) -> float:
    """A summed loss in nats over the text's bytes, in bits: comparable across tokenizers."""
    return nats / (math.log(2) * _some(n_bytes, "bytes"))


def perplexity(nats: float, n_tokens: int) -> float:
    """exp of the mean loss; infinite when it does not fit a float."""
    try:
        return math.exp(nats / _some(n_tokens, "tokens"))
    except OverflowError:
        return math.inf


def accuracy(predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor) -> float:
    """The share of equal pairs."""
    p, y = _pairs(predictions, labels)
    return (p == y).double().mean().item()


def f1(predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor, *, positive: int = 1) -> float:
    """2 tp / (2 tp + fp + fn) of one class; 0 where the class occurs nowhere."""
    p, y = _pairs(predictions, labels)
    return _f1(p == positive, y == positive)


def macro_f1(predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor) -> float:
    """The mean of `f1` over every class that is predicted or true somewhere."""
    p, y = _pairs(predictions, labels)
    classes = torch.cat([p, y]).unique()
    return sum(_f1(p == c, y == c) for c in classes) / len(classes)


def micro_f1(predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor) -> float:
    """F1 of the counts pooled over classes: where each example has one label, every miss is one fp and one fn, so it is the accuracy."""
    return accuracy(predictions, labels)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions equal to their reference, outer white space aside."""
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} references")
    hits = sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))
    return hits / _some(len(references), "references")


def _f1(predicted: Tensor, true: Tensor) -> float:
    hits, total = (predicted & true).sum().item(), (predicted.sum() + true.sum()).item()
    return 2 * hits / total if total else 0.0


def _pairs(predictions: Sequence[int] | Tensor, labels: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    p, y = torch.as_tensor(predictions).flatten(), torch.as_tensor(labels).flatten()
    if len(p) != len(y):
        raise DataError(f"{len(p)} predictions for {len(y)} labels")
    _some(len(y), "labels")
    return p, y


def _some(n: int, what: str) -> int:
    if n <= 0:
        raise DataError(f"a score over {n} {what} is not defined")
    return n
