"""Flora: an optimizer of whole weights whose momentum is kept as a random projection (arXiv:2402.03293).

    u = rule(G)                            what a rule without momentum would step by: G itself (SGD), or G / √v̂ (Adafactor)
    û = (1 − β) u + β · up(m)              the step; Adafactor limits its size and scales it by the weight's
    m ← β m + (1 − β) down(u)              r × max(m, n) values instead of m × n

P is drawn anew every κ steps, and m moves over: m ← down_new(up_old(m)). That makes m √(d / r) times larger on average, d the smaller
dimension, so β^κ must be smaller than √(r / d).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.core.errors import BadParameter
from lorakit.core.params import ParamTable
from lorakit.parts.optimizers.projection import Projections, compressed, down, up

State = dict[str, Tensor]


class Rule(Protocol):
    """What a step would be without momentum."""

    def direction(self, grad: Tensor, state: State, n: int) -> Tensor:
        """u of the n-th step, n from 1."""

    def bounded(self, update: Tensor) -> Tensor:
        """The step û, limited in size."""

    def scale(self, p: Tensor) -> Tensor | float:
        """A factor on the learning rate."""


@dataclass(frozen=True)
class Plain:
    """u = G."""

    def direction(self, grad: Tensor, state: State, n: int) -> Tensor:
        return grad

    def bounded(self, update: Tensor) -> Tensor:
        return update

    def scale(self, p: Tensor) -> float:
        return 1.0


@dataclass(frozen=True)
class Adafactor:
    """u = G / √v̂, v̂ a rank-one estimate of the mean square of G from its rows' and columns' means (arXiv:1804.04235)."""

    eps: tuple[float, float] = (1e-30, 1e-3)
    """Beside G², and the least scale of a weight."""
    clip: float = 1.0
    """Largest root mean square of a step before the learning rate."""
    decay: float = -0.8
    """The averages of step n forget with 1 − n^decay."""
    scale_parameter: bool = True
    """Whether steps are relative to the weight's root mean square."""

    def direction(self, grad: Tensor, state: State, n: int) -> Tensor:
        square, new = grad.square() + self.eps[0], n**self.decay
        if grad.ndim < 2:
            return grad * _averaged(state, "square", square, new).rsqrt()
        row, column = _averaged(state, "row", square.mean(-1), new), _averaged(state, "column", square.mean(-2), new)
        return grad * (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * column.rsqrt()[..., None, :]

    def bounded(self, update: Tensor) -> Tensor:
        return update / (_rms(update) / self.clip).clamp_min(1.0)

    def scale(self, p: Tensor) -> Tensor | float:
        return _rms(p).clamp_min(self.eps[1]) if self.scale_parameter else 1.0


def _averaged(state: State, name: str, value: Tensor, new: float) -> Tensor:
    """A running average in the state, moved toward `value` by the share `new`."""
    return state.setdefault(name, torch.zeros_like(value)).lerp_(value, new)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


@dataclass(frozen=True)
class Flora:
    """Rank r of the compression, β of the momentum (0: none), κ steps of one P, the rule, the projections' seed."""

    r: int = 256
    beta1: float = 0.9
    kappa: int = 1000
    base: Rule = Adafactor()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1 or self.kappa < 1 or not 0 <= self.beta1 < 1:
            raise BadParameter(f"r={self.r} and kappa={self.kappa} must be at least 1, beta1={self.beta1} in [0, 1)")

    @property
    def rule(self) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        """The optimizer itself, for the memory estimator to trace: its state follows from r and from every shape."""
        return lambda params: FloraOptimizer([{"params": params}], self, lr=0.0, weight_decay=0.0)

    def build(self, table: ParamTable, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """The optimizer of a run, in one group in the table's order. Raises BadParameter for a momentum that would grow without bound."""
        for p in table:
            self._check(p.name, p.tensor.shape)
        group = {"params": [p.tensor for p in table], "names": [p.name for p in table]}
        return FloraOptimizer([group], self, lr=lr, weight_decay=weight_decay)

    def compresses(self, shape: torch.Size) -> bool:
        """Matrices larger than r both ways and at most four times as long as wide, which leaves embeddings out (the official rule)."""
        return len(shape) == 2 and min(shape) > self.r and max(shape) <= 4 * min(shape)

    def _check(self, name: str, shape: torch.Size) -> None:
        if self.beta1 == 0 or not self.compresses(shape):
            return
        wider = min(shape) / self.r  # what moving m over does to ‖m‖², on average; in between it decays by β^2κ
        least = math.floor(math.log(wider) / (-2 * math.log(self.beta1))) + 1
        if self.kappa < least:
            raise BadParameter(
                f"kappa={self.kappa} is too short for beta1={self.beta1} and r={self.r}: at {name} every new projection makes the momentum "
                f"√{wider:.3g} times larger, more than it decays in between; use kappa >= {least}"
            )


class FloraOptimizer(torch.optim.Optimizer):
    """State of a compressed matrix: m [r × the larger dimension], the rule's own, a step count."""

    def __init__(self, params: Iterable[dict[str, Any]], spec: Flora, *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.spec, self.projections = spec, Projections(spec.r, spec.seed, "momentum")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise BadParameter("Flora takes no closure; call step() after backward()")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["lr"], group["weight_decay"])

    def _update(self, p: Tensor, lr: float, weight_decay: float) -> None:
        state, rule = self.state[p], self.spec.base
        count = state.setdefault("step", torch.zeros(()))  # on the CPU, as torch's own optimizers have it
        count += 1
        n = int(count)
        update = rule.bounded(self._with_momentum(rule.direction(p.grad, state, n), state, n))  # type: ignore[arg-type]
        rate = lr * rule.scale(p)
        p.mul_(1 - weight_decay * rate).sub_(update * rate)

    def _with_momentum(self, u: Tensor, state: State, n: int) -> Tensor:
        beta = self.spec.beta1
        if beta == 0:
            return u
        if not self.spec.compresses(u.shape):
            return state.setdefault("m", torch.zeros_like(u)).lerp_(u, 1 - beta)
        m = state.setdefault("m", u.new_zeros(compressed(u.shape, self.spec.r)))
        P = self.projections.of((n - 1) // self.spec.kappa, u)
        step = torch.lerp(u, up(m, P, u.shape), beta)
        if n % self.spec.kappa == 0:
            old, P = P, self.projections.of(n // self.spec.kappa, u)
            m.copy_(down(up(m, old, u.shape), P))
        m.lerp_(down(u, P), 1 - beta)
        return step
