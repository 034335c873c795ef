"""Whether a model can be trained on packed windows: asked of the model itself, by a tiny forward, not of a list of names."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.errors import DataError, Incompatible
from lorakit.data.encoded import Encoded
from lorakit.data.pack import collate, pack

# Relative to the largest logit; seeing a neighbor changes far more. TF32 and eager attention, which rounds to float32, must pass.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def check_packing(model: nn.Module) -> None:
    """DataError with the reason if a document's logits in a packed window would not be those it has alone.

    Runs two short documents packed and alone, in eval mode and without gradients; the model is left as it was.
    """
    reason = why_not_packable(model)
    if reason:
        raise DataError(f"{type(model).__name__} cannot be trained on packed windows: {reason}; turn packing off to pad instead")


def why_not_packable(model: nn.Module) -> str | None:
    """The reason as a clause, or None if packing is exact."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose inputs and targets are separate sequences"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, so positions cannot restart at each document"
    try:
        return _probe(model)
    except Incompatible as refused:  # a patch of the model that stands in front of one document
        return str(refused)


@torch.no_grad()
def _probe(model: nn.Module) -> str | None:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = [(7 * i + 3) % embeddings.num_embeddings for i in range(11)]
    first, second = Encoded(ids[:6], ids[:6]), Encoded(ids[6:], ids[6:])
    with eval_mode(model):
        together, alone = _logits(model, [first, second]), _logits(model, [second])
    if together.shape[:-1] != (1, 11):
        return "it gives one answer per sequence, so a window of several would get only one"
    error = (together[:, 6:] - alone).abs().max() / alone.abs().max()
    if not error <= _TOLERANCE.get(alone.dtype, 5e-2):
        return "a document's outputs change with its neighbor's in the window, as its attention does not follow restarting position_ids"
    return None


def _logits(model: nn.Module, documents: list[Encoded]) -> Tensor:
    length = sum(len(d.input_ids) for d in documents)
    batch = collate(pack(documents, length))
    del batch["labels"]
    device = next(model.parameters()).device
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    logits: Tensor = model(**batch).logits
    return logits


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """eval() inside; after it each module is in the mode that it was in before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
