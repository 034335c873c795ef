"""Another optimizer's rule on Riemannian-preconditioned gradients of every trained pair (A, B).

    g_A ← (BᵀB + reg·I)⁻¹ g_A        g_B ← g_B (AAᵀ + reg·I)⁻¹        A: r × d_in, B: d_out × r

Both from the A and B of before the step. Moments are those of preconditioned gradients. Parameters in no pair (a magnitude, a gate, a
head) keep the plain rule. The raw gradients are back in place after the step, so that controllers see those.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.core.errors import BadParameter
from lorakit.core.params import ParamTable
from lorakit.core.site import MIXTURES, Kind
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.parts.optimizers.sgd import SGD


@dataclass(frozen=True)
class Riemannian:
    """`base` decides the rule and the rates; `reg` damps the inverses."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES

    base: AdamW | SGD = AdamW()
    reg: float = 1e-6

    def __post_init__(self) -> None:
        if self.reg <= 0:
            raise BadParameter(f"reg={self.reg} is not possible; B starts at zero and BᵀB + reg·I must be invertible, so reg > 0")

    @property
    def rule(self) -> str:
        """The base's: preconditioning keeps no state."""
        return self.base.rule

    def build(self, table: ParamTable, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """The base's optimizer, whose step sees preconditioned gradients."""
        optimizer = self.base.build(table, lr=lr, weight_decay=weight_decay)
        around = _Around(table, self.reg)
        optimizer.register_step_pre_hook(around.before)
        optimizer.register_step_post_hook(around.after)
        return optimizer


@dataclass
class _Around:
    """What happens before and after a step. It holds addresses, not tensors: ranks may grow between two steps."""

    table: ParamTable
    reg: float
    raw: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put preconditioned gradients in place."""
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # the first is the optimizer itself
            raise BadParameter("a closure would overwrite the preconditioned gradients; call step() without one")
        pairs = [(a.tensor, b.tensor) for a, b in self.table.pairs()]
        inverses = damped_inverses([gram for A, B in pairs for gram in (wide(B).mT @ wide(B), wide(A) @ wide(A).mT)], self.reg)
        for (A, B), for_A, for_B in zip(pairs, inverses[::2], inverses[1::2], strict=True):
            if A.grad is not None:
                self._exchange(A, for_A @ wide(A.grad))
            if B.grad is not None:
                self._exchange(B, wide(B.grad) @ for_B)

    def after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the raw gradients back."""
        for tensor, grad in self.raw:
            tensor.grad = grad
        self.raw.clear()

    def _exchange(self, tensor: Tensor, grad: Tensor) -> None:
        assert tensor.grad is not None
        self.raw.append((tensor, tensor.grad))
        tensor.grad = grad.to(tensor.dtype)


def wide(tensor: Tensor) -> Tensor:
    """In fp64, where a reg of 1e-6 beside a gram of 100 is still seen; in fp32 on devices that have no fp64."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def damped_inverses(grams: list[Tensor], reg: float) -> list[Tensor]:
    """(gram + reg·I)⁻¹ of each [.., r, r]; those of one shape in one call, since hundreds of small ones would wait for a GPU."""
    out: dict[int, Tensor] = {}
    for shape in {gram.shape for gram in grams}:
        where = [i for i, gram in enumerate(grams) if gram.shape == shape]
        stacked = torch.stack([grams[i] for i in where])
        eye = torch.eye(shape[-1], dtype=stacked.dtype, device=stacked.device)
        out |= dict(zip(where, torch.linalg.inv(stacked + reg * eye), strict=True))
    return [out[i] for i in range(len(grams))]
