"""BiLoRA: bi-level optimization of singular vectors and singular values.

    ΔW = s · B diag(Λ) A                       s = alpha / r, V = (A, B), Λ: r
    V*(Λ) = argmin_V L(V, Λ; D1) + orth · R(V)         min_Λ L(V*(Λ), Λ; D2) + binary · H(Λ)

D1 and D2 are disjoint shares of the training data, 1 − `upper` and `upper` of a fixed shuffle, so Λ is chosen on data that V was not fitted
to. A step updates Λ with the hypergradient of one unrolled step V' = V − ξ ∇_V L1 (ξ the learning rate),

    ∇_Λ L2(V', Λ) − ξ (∇_Λ L1(V + ε v, Λ) − ∇_Λ L1(V − ε v, Λ)) / 2ε        v = ∇_V' L2(V', Λ), ε = 0.01 / ‖v‖

and then V with ∇_V (L1 + orth · R). It costs five gradients where LoRA needs one; `unrolled=False` is the first-order form without the
implicit term, and costs two. R is AdaLoRA's orthogonality of the rows of A and columns of B.
`values`: "real" (Λ itself), "softmax" (Λ >= 0, ΣΛ = 1 by site), or "binary" (Λ = sigmoid, its entropy H pushes it to 0 or 1).
Trained: A, B, Λ: r (d_in + d_out + 1) a site; A as in `lora`, B = 0, Λ = 1, 1/r or 1/2. Exported: plain LoRA with Λ folded in.
Defaults: r 8, upper 0.2, orth 0.1 (from memory); `ratio` 1, the rate of Λ by that of V, is ours; no public implementation was found, so
this is our reading of the abstract and of reviews.
References: arXiv:2403.13037; survey 3.3.3.

Use it when labels are very noisy and there is little data: its two levels hold singular values back from what the vectors fit. We saw a
gain under heavy noise only; with little noise or none LoRA was better with every seed (log), and it takes five gradients a step.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lorakit.core.attach import Adapted
from lorakit.core.base import Base
from lorakit.core.delta import Delta
from lorakit.core.errors import BadParameter
from lorakit.core.events import Loop, MicroBatches, Run, Step
from lorakit.core.lowrank import LowRankSpec, Squash
from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Site, Where
from lorakit.parts.inits.random import Kaiming, set_
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.parts.penalties.orthogonal import Orthogonal

FORMS: dict[str, Squash] = {"real": "none", "softmax": "softmax", "binary": "sigmoid"}


@dataclass(frozen=True)
class EvenValues:
    """LoRA's start, and all Λ of a site equal."""

    start: float
    requires: frozenset[str] = frozenset({"factors", "gate"})

    def __call__(self, delta: Delta, base: Base, site: Site, rng: torch.Generator) -> None:
        Kaiming()(delta, base, site, rng)
        set_(delta.g, torch.full_like(delta.g, self.start))  # type: ignore[arg-type]


@dataclass(frozen=True)
class BilevelSpec:
    """The two levels, as values."""

    upper: float
    unrolled: bool
    orth: float
    binary: float
    requires: frozenset[str] = frozenset({"gate"})

    def __post_init__(self) -> None:
        if not 0 < self.upper < 1:
            raise BadParameter(f"upper={self.upper} is not a share of the data; expected 0 < upper < 1")

    def build(self, run: Run) -> "Bilevel":
        return Bilevel(self, run)


class Bilevel(Loop):
    """One step of each level."""

    def __init__(self, spec: BilevelSpec, run: Run) -> None:
        self.spec, self.run = spec, run
        self.lower, self.upper = run.stream(0.0, 1 - spec.upper), run.stream(1 - spec.upper, 1.0)

    def step(self, info: Step) -> tuple[float, int]:
        fit, judge = next(self.lower), next(self.upper)
        hyper = self._hypergradient(fit, judge, info)
        for value, gradient in zip(self._values(), hyper, strict=True):
            value.grad = gradient
        self.run.update(info)
        done = self._lower_gradients(fit, info)
        for value in self._values():
            value.grad = None
        self.run.update(info)
        return done

    def _hypergradient(self, fit: MicroBatches, judge: MicroBatches, info: Step) -> list[Tensor]:
        """Of the upper loss for Λ; everything is left as it was, gradients gone."""
        vectors, before = self._vectors(), [v.detach().clone() for v in self._vectors()]
        if self.spec.unrolled:
            self._lower_gradients(fit, info)
            rate = self.run.optimizer.param_groups[0]["lr"]
            self._move(before, [v.grad for v in vectors], -rate)
            self._clear()
        self.run.gradients(judge, info)
        if self.spec.binary:
            (self.spec.binary * entropy(self.run.adapted)).backward()
        hyper, v = self._take(self._values()), self._take(vectors)
        self._clear()
        if self.spec.unrolled:
            eps = 0.01 / max(float(torch.stack([g.norm() for g in v]).norm()), 1e-12)
            sides = [self._at(before, v, sign * eps, fit, info) for sign in (1, -1)]
            hyper = [h - rate * (up - down) / (2 * eps) for h, up, down in zip(hyper, *sides, strict=True)]
        self._move(before, v, 0.0)
        return hyper

    def _at(self, before: list[Tensor], v: list[Tensor], eps: float, fit: MicroBatches, info: Step) -> list[Tensor]:
        """∇_Λ L1 at V + ε v."""
        self._move(before, v, eps)
        self.run.gradients(fit, info)
        found = self._take(self._values())
        self._clear()
        return found

    def _lower_gradients(self, fit: MicroBatches, info: Step) -> tuple[float, int]:
        done = self.run.gradients(fit, info)
        if self.spec.orth:
            Orthogonal(self.spec.orth)(self.run.adapted, self.run.adapted.context).backward()
        return done

    @torch.no_grad()
    def _move(self, before: list[Tensor], along: list[Tensor | None] | list[Tensor], by: float) -> None:
        for now, start, direction in zip(self._vectors(), before, along, strict=True):
            now.copy_(start if direction is None else start + by * direction)

    def _take(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in tensors]

    def _clear(self) -> None:
        for row in self.run.adapted.params():
            row.tensor.grad = None

    def _values(self) -> list[Tensor]:
        return [row.tensor for row in self.run.adapted.params() if row.role == "g"]

    def _vectors(self) -> list[Tensor]:
        return [row.tensor for row in self.run.adapted.params() if row.role != "g"]


def entropy(adapted: Adapted) -> Tensor:
    """Mean binary entropy of Λ = sigmoid(g), in nats."""
    p = torch.cat([torch.sigmoid(row.tensor) for row in adapted.params().by_role("g")])
    return -(p.xlogy(p) + (1 - p).xlogy(1 - p)).mean()


@method("bilora", paper="arXiv:2403.13037", survey="3.3.3", kind="loop")
def bilora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    upper: float = 0.2,
    values: Literal["real", "softmax", "binary"] = "real",
    unrolled: bool = True,
    ratio: float = 1.0,
    orth: float = 0.1,
    binary: float = 0.1,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA in SVD form whose singular values are fitted on data that its vectors do not see."""
    loop = BilevelSpec(upper, unrolled, orth, binary if values == "binary" else 0.0)
    spec = LowRankSpec(Rank.of(r, alpha), dropout, train=("A", "B", "g"), gate=True, squash=FORMS[values])
    init = EvenValues(1.0 if values == "real" else 0.0)
    return Method(spec, init, sites=sites, unfreeze=unfreeze, optim=AdamW(ratios=(("g", ratio),)), loop=loop)
