"""The penalty that keeps the directions of an SVD-shaped adapter apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.attach import Adapted
from lorakit.core.context import Ctx


@dataclass(frozen=True)
class Orthogonal:
    """γ · mean over all A and B of the Frobenius distance of their Gram matrix from the identity."""

    weight: float
    requires: frozenset[str] = frozenset({"factors"})

    def __call__(self, adapted: Adapted, ctx: Ctx) -> Tensor:
        table = adapted.params()
        grams = [p.tensor @ p.tensor.T for p in table.by_role("A")] + [p.tensor.T @ p.tensor for p in table.by_role("B")]
        distances = [torch.linalg.norm(G - torch.eye(len(G), dtype=G.dtype, device=G.device)) for G in grams]
        return self.weight * torch.stack(distances).mean()
