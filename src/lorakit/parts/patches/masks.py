"""Attention masks: bool [b or 1, h or 1, t, s], True where query i may see key j; or numbers added to the scores; None: every key.

Transformers passes either form, depending on the attention implementation. These functions keep the form that they are given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal(t: int, s: int, device: torch.device) -> Tensor:
    """[1, 1, t, s]: query i sees the keys up to i. Keys beyond the t-th are the empty end of a preallocated cache."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril()[None, None]


def restricted(mask: Tensor | None, seen: Tensor) -> Tensor:
    """`mask` where `seen` (bool, of any shape that broadcasts) allows it, nothing elsewhere."""
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else mask & seen
    return torch.where(seen, mask, torch.finfo(mask.dtype).min)


def lengthened(mask: Tensor | None, n: int) -> Tensor | None:
    """n more keys in front that every query sees."""
    return None if mask is None else F.pad(mask, (n, 0), value=1 if mask.dtype == torch.bool else 0.0)


def visible(mask: Tensor) -> Tensor:
    """The bool form; a number near the type's smallest hides its key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The form with numbers."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
