"""A step of the optimizer that moves only a part of some parameters.

Masking their gradients is not enough: momentum, weight decay and Adam's averages go on moving what has none. So what must stay is put back
after the step, bit for bit, and so is the optimizer's state of it. The step count is the whole parameter's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Partial:
    """Call `before` when the gradients are there and `after` when the step is done."""

    held: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """(tensor, what of it moves, its values before the step)."""

    def before(self, optimizer: torch.optim.Optimizer, moved: Iterable[tuple[Tensor, Tensor]]) -> None:
        """`moved`: parameters, and boolean masks that broadcast to their shapes."""
        for p, mask in moved:
            if p.grad is not None:
                p.grad.masked_fill_(~mask, 0.0)
            state = [v for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor) and v.shape == p.shape]
            self.held += [(tensor, mask, tensor.detach().clone()) for tensor in (p, *state)]

    @torch.no_grad()
    def after(self) -> None:
        """Put back what must not move."""
        for tensor, mask, values in self.held:
            tensor.copy_(torch.where(mask, tensor, values))
        self.held.clear()
