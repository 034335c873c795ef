"""Padding: one sample a row, filled on the right, for models and tasks that cannot be packed."""

from collections.abc import Sequence

import torch

from lorakit.data.encoded import IGNORED, Encoded, Labeled
from lorakit.data.pack import Packed, filled, kinds_of


def pad(samples: Sequence[Encoded] | Sequence[Labeled], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch for `model(**batch)`: input_ids and attention_mask [batch, longest], and labels.

    Labels are [batch, longest] with IGNORED where there is padding (for encoder-decoder samples as long as the longest
    target), or [batch] class numbers for `Labeled` samples. `kinds` as in `collate`.
    """
    ids = [sample.input_ids for sample in samples]
    width = max(map(len, ids))
    return {
        "input_ids": filled(ids, pad_id, width),
        "attention_mask": filled([[1] * len(row) for row in ids], 0, width),
        "labels": _labels(samples),
        **kinds_of([None if s.kind is None else [s.kind] * len(s.input_ids) for s in samples], width),
    }


def n_tokens(item: Encoded | Labeled | Packed) -> int:
    """What an item counts in a batch: its tokens."""
    return len(item.input_ids)


def n_tokens_both(sample: Encoded) -> int:
    """The same for an encoder-decoder, where targets are padded beside the inputs: the tokens of both."""
    return len(sample.input_ids) + len(sample.labels)


def _labels(samples: Sequence[Encoded] | Sequence[Labeled]) -> torch.Tensor:
    classes = [sample.label for sample in samples if isinstance(sample, Labeled)]
    if classes:
        return torch.tensor(classes, dtype=torch.long)
    labels = [sample.labels for sample in samples if isinstance(sample, Encoded)]
    return filled(labels, IGNORED, max(map(len, labels)))
