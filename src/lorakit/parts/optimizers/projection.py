"""Random projections that compress a matrix to r rows or columns and back, without bias.

    down(G) = P G        up(C) = Pᵀ C        P: r × m, where m < n        G: m × n
    down(G) = G Pᵀ       up(C) = C P         P: r × n, elsewhere          P_ij ~ N(0, 1/r), so E[PᵀP] = I

P is no projection in the strict sense: its rows are not orthonormal, and up(down(G)) ≠ G however large r is. Its relative error is about
√(d / r), d the smaller dimension, and averages out over draws of P, never within one.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.core import random


@dataclass
class Projections:
    """The P of every draw and dimension, a pure function of (seed, draw, dimension), drawn on the CPU: the same bits on any device.

    Matrices of one dimension share a draw's P, which leaves each of them unbiased; so a step makes a few P instead of hundreds, and those
    of the last two draws can be kept. They are no state: a resumed run draws them again.
    """

    r: int
    seed: int
    name: str
    """Draws under two names are independent."""
    held: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict)

    def of(self, draw: int, like: Tensor) -> Tensor:
        """P [r, d] for matrices shaped as `like`, whose smaller dimension is d."""
        key = (draw, min(like.shape), like.device)
        if key not in self.held:
            self.held = {k: P for k, P in self.held.items() if k[0] >= draw - 1}
            rng = random.generator(self.seed, f"{self.name} {draw} {key[1]}")
            drawn = torch.empty(self.r, key[1]).normal_(0, 1 / math.sqrt(self.r), generator=rng)
            self.held[key] = drawn.to(like.device)
        return self.held[key].to(like.dtype)


def down(G: Tensor, P: Tensor) -> Tensor:
    """[m, n] -> [r, n], or [m, r]: the smaller dimension is compressed."""
    return P @ G if G.shape[0] < G.shape[1] else G @ P.T


def up(C: Tensor, P: Tensor, shape: torch.Size) -> Tensor:
    """Back to [m, n]."""
    return P.T @ C if shape[0] < shape[1] else C @ P


def compressed(shape: torch.Size, r: int) -> tuple[int, int]:
    """The shape of `down`."""
    return (r, shape[1]) if shape[0] < shape[1] else (shape[0], r)
