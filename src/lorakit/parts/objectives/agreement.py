"""Two stochastic forwards of one micro-batch, which are to agree (R-Drop's bidirectional divergence).

    L = ½ (CE₁ + CE₂) + weight · ½ Σ_targets [KL(p₁‖p₂) + KL(p₂‖p₁)]

p_i is the softmax of the i-th forward's logits, each under masks of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.attach import Adapted
from lorakit.core.errors import BadParameter
from lorakit.core.events import Scored
from lorakit.core.site import MIXTURES, Kind


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """½ Σ [KL(p‖q) + KL(q‖p)] over rows, for logits a, b [n, classes]: ½ Σ (p − q)(log p − log q), at least in fp32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    log_p, log_q = a.to(wide).log_softmax(-1), b.to(wide).log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


@dataclass(frozen=True)
class Agreement:
    """The objective. With weight 0 there is nothing to agree on, and one forward would do: leave it out."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    weight: float
    requires: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise BadParameter(f"the weight of the divergence is {self.weight}; it must be positive")

    def __call__(self, score: Callable[[int], Scored], adapted: Adapted) -> tuple[Tensor, int]:
        one, two = score(0), score(1)
        return 0.5 * (one.loss + two.loss) + self.weight * divergence(one.logits, two.logits), one.n
