"""An encoder of inputs, trained so that those of one task lie together (LoraRetriever, arXiv:2402.09997, section 3.2).

    e(x) = mean over tokens of the last hidden state, of unit length
    loss = −log exp(e(x)·e(x⁺)/τ) / Σ_j exp(e(x)·e(x_j)/τ)          x, x⁺ of one task, x_j the partners of all tasks of the batch; both ways

What is trained is a LoRA on the base, nothing else: the encoder is an ordinary adapter. The paper trains on some tasks and finds others,
too; how far that goes depends on the base (docs/log.md).
Ours: the base as encoder (the paper takes INSTRUCTOR), in-batch negatives, a window of each text at random, and the defaults.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach
from lorakit.core.errors import DataError
from lorakit.core.method import get_method

META = "encoder"
"""Where the adapter's meta says that it is one, and how it was trained."""


def train_encoder(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[str]],
    *,
    r: int = 8,
    steps: int = 100,
    batch: int = 8,
    tokens: int = 128,
    tau: float = 0.05,
    lr: float = 1e-3,
    seed: int = 0,
) -> Adapter:
    """A LoRA under which the base tells tasks apart; the model is as it was afterwards.

    Args:
        tasks: some inputs of each, by name: at least two tasks of at least two inputs.
        batch: tasks in a step (all, where there are fewer), with two inputs of each.
        tokens: the longest window of an input.

    Raises DataError.
    """
    few = [name for name, texts in tasks.items() if len(texts) < 2]
    if len(tasks) < 2 or few:
        what = f"{few[0]!r} has {len(tasks[few[0]])}" if few else f"{len(tasks)} tasks were given"
        raise DataError(f"an encoder is trained on at least two tasks with at least two inputs each; {what}")
    ids = {name: [_ids(tokenizer, text) for text in texts] for name, texts in tasks.items()}
    draw, losses = random.Random(seed), list[float]()
    adapted = attach(model, get_method("lora", r=r, alpha=2.0 * r, dropout=0.0, sites="all-linear"), name="retriever", seed=seed)
    try:
        optimizer = torch.optim.AdamW([row.tensor for row in adapted.params()], lr=lr, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            pairs = [draw.sample(ids[name], 2) for name in draw.sample(sorted(ids), min(batch, len(ids)))]
            one, other = ([_window(pair[i], tokens, draw) for pair in pairs] for i in (0, 1))
            e = encoded(model, [*one, *other])
            loss = contrast(e[: len(pairs)], e[len(pairs) :], tau)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found = adapted.state()
    finally:
        adapted.detach()
    settings = {"tasks": sorted(tasks), "steps": steps, "batch": batch, "tokens": tokens, "tau": tau, "lr": lr, "seed": seed}
    return replace(found, meta={**found.meta, META: {**settings, "loss": losses[-1]}})


def contrast(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """InfoNCE of partners a [n, d], b [n, d] of unit length, both ways."""
    logits, own = a @ b.T / tau, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def encoded(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """e of each row of token ids: [n, d], fp32."""
    return F.normalize(pooled(model, rows), dim=1)


def pooled(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """The mean of the last hidden states over each row of token ids: [n, d], fp32."""
    device, longest = next(model.parameters()).device, max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long, device=device) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, device=device), 1
    hidden = body_of(model)(input_ids=ids, attention_mask=mask).last_hidden_state.float() * mask[..., None]
    means: Tensor = hidden.sum(1) / mask.sum(1, keepdim=True)
    return means


def body_of(model: nn.Module) -> Any:
    """What makes hidden states of token ids: of an encoder-decoder the encoder."""
    net: Any = model
    return net.get_encoder() if net.config.is_encoder_decoder else net.base_model


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found = list(tokenizer(text, verbose=False)["input_ids"])
    if not found:
        raise DataError("an input of a task has no tokens; leave it out")
    return found


def _window(ids: Sequence[int], tokens: int, draw: random.Random) -> Sequence[int]:
    start = draw.randrange(max(1, len(ids) - tokens + 1))
    return ids[start : start + tokens]
