"""Which tensors: a digest that tells an adapter from what later became of it, and the ingredients of a mixture apart."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 32 hex digits of sha256 of their names and bytes, in whatever order they come; one is looked at at a time."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
