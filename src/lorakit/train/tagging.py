"""Held-out figures of token classification: loss and accuracy over labeled tokens, and F1.

Where the tags are spans' (B-PER, I-PER, O; BIOES and BILOU too), F1 counts whole entities, pooled over types: a span is right with its type
and both its ends, as conlleval counts. Other tags have the mean over classes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.attach import Adapted
from lorakit.train.distributed import World
from lorakit.train.kinds import told
from lorakit.train.metrics import forward_scored

SPAN = re.compile(r"([BIESLU])-(.+)")
Span = tuple[str, int, int]


@dataclass(frozen=True)
class TagJudge:
    """The tags in the order of the model's outputs."""

    names: tuple[str, ...]

    @property
    def spans(self) -> bool:
        """Whether the tags mark spans."""
        marks = [name for name in self.names if name != "O"]
        return bool(marks) and all(map(SPAN.fullmatch, marks)) and any(name[0] in "BISU" for name in marks)

    def __call__(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], world: World, adapted: Adapted | None) -> dict[str, float]:
        """{loss, accuracy, entity_f1}, or macro_f1 in its place."""
        c = len(self.names)
        nats, counts = 0.0, torch.zeros(3 * c + 3, dtype=torch.float64)  # by class, then of entities: hits, predicted, true
        for batch in batches:
            with told(model, batch) as inputs:
                scored = forward_scored(model, inputs)
            nats += scored.loss.item()
            for row, kept, labels in zip(scored.outputs.argmax(-1).cpu(), batch["labels"].cpu() >= 0, batch["labels"].cpu(), strict=True):
                counts += self._counts(row[kept], labels[kept], c)
        nats, *rest = world.total(nats, *counts.tolist())
        hits, predicted, true = (rest[i * c : (i + 1) * c] for i in range(3))
        n = max(1.0, sum(true))
        f1 = {"entity_f1": _f1(*rest[3 * c :])} if self.spans else {"macro_f1": _macro(hits, predicted, true)}
        return {"loss": nats / n, "accuracy": sum(hits) / n} | f1

    def _counts(self, found: Tensor, labels: Tensor, c: int) -> Tensor:
        by_class = [part.bincount(minlength=c) for part in (labels[found == labels], found, labels)]
        p, y = (entities([self.names[i] for i in part.tolist()]) if self.spans else set[Span]() for part in (found, labels))
        return torch.cat([*by_class, torch.tensor([len(p & y), len(p), len(y)])])


def entities(tags: Sequence[str]) -> set[Span]:
    """(type, first, last) of each span. A span begins at B, S, U, at another type, or inside without a beginning; it ends before the next
    begins, or after E, L, S, U."""
    found, start, before = set[Span](), 0, ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        match = SPAN.fullmatch(tag)
        mark, kind = match.groups() if match else ("O", "")
        begins = mark != "O" and (mark in "BSU" or before[0] in "OELSU" or kind != before[1])
        if before[0] != "O" and (mark == "O" or begins):
            found.add((before[1], start, i - 1))
        start, before = i if begins else start, (mark, kind)
    return found


def _f1(hits: float, predicted: float, true: float) -> float:
    return 2 * hits / (predicted + true) if predicted + true else 0.0


def _macro(hits: Sequence[float], predicted: Sequence[float], true: Sequence[float]) -> float:
    seen = [_f1(*counts) for counts in zip(hits, predicted, true, strict=True) if counts[1] or counts[2]]
    return sum(seen) / max(1, len(seen))
