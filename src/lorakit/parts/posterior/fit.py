"""The Laplace approximation at the end of training: K-FAC curvature of every pair, and the prior variance of highest evidence.

    H_A ≈ (Σ x xᵀ) ⊗ (Σ g gᵀ) / M        over the M tokens whose gradient is not zero (K-FAC "expand"), g the gradient of A's output
    H_B ≈ (Σ z zᵀ) ⊗ (Σ g gᵀ) / M        likewise
    log p(D | σ²) ≈ log p(D | θ) − ‖θ‖² / 2σ² − ½ log det(I + σ² H)

g is of log p(y) with y from the model itself, not from the data: the expectation over all classes where there are few, which makes H the
generalized Gauss-Newton matrix's K-FAC, else one y a target, drawn.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core import random
from lorakit.core.errors import BadParameter
from lorakit.core.events import Controller, Run
from lorakit.core.layer import Branch
from lorakit.parts.posterior.factors import NAME, Posterior
from lorakit.parts.posterior.kronecker import Kronecker, updated
from lorakit.parts.posterior.trace import Seen, backward, check_plain, traced

FEW = 64
"""Up to so many classes, the expectation over them is taken instead of a draw."""
GRID = torch.logspace(-8, 6, 561, dtype=torch.float64)
"""Prior variances that are tried."""


@dataclass(frozen=True)
class Laplace:
    """`variance`: the prior's, or 0 for the one of highest evidence. `batches` of the training data, 0: all of it."""

    variance: float
    batches: int
    requires: frozenset[str] = frozenset({"factors"})
    likelihood: ClassVar[bool] = True
    """It needs a loss that is one of predicted tokens or classes."""

    def __post_init__(self) -> None:
        if self.variance < 0 or self.batches < 0:
            raise BadParameter(f"prior_variance={self.variance} and batches={self.batches} must be at least 0")

    def build(self, run: Run) -> "Fit":
        return Fit(self, run)


class Fit(Controller):
    """Fits the posterior when training is over."""

    def __init__(self, spec: Laplace, run: Run) -> None:
        self.spec, self.run = spec, run
        check_plain(run.adapted.branches())  # now, and not when training is over

    def finish(self) -> None:
        (name,) = self.run.adapted.active
        posterior = self.run.adapted.shared(name)[NAME]
        assert isinstance(posterior, Posterior)
        branches = self.run.adapted.branches()
        curvature = Curvature(posterior, branches)
        self.run.adapted.model.eval()
        for batch in self.run.calibration(self.spec.batches).batches:
            with traced(branches, curvature.add):
                logits = self.run.scored(batch).logits
                for term in fisher_terms(logits, random.generator(self.run.adapted.seed, f"{NAME}:{curvature.batches}")):
                    backward(term, branches)
            curvature.batches += 1
        curvature.store(self.run)
        best = self.spec.variance or most_evident(posterior, branches)
        posterior.variance.fill_(best)


def fisher_terms(logits: Tensor, rng: torch.Generator) -> list[Tensor]:
    """Scalars whose gradients' squares, target by target, sum to the Fisher information of the logits [n, c]."""
    log_p = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=-1)
    p = log_p.detach().exp()
    if logits.shape[-1] <= FEW:
        return [(p[:, c].sqrt() * log_p[:, c]).sum() for c in range(logits.shape[-1])]
    drawn = torch.multinomial(p.cpu(), 1, generator=rng).to(p.device)
    return [log_p.gather(1, drawn).sum()]


class Curvature:
    """Sums over batches, of low rank on the long sides."""

    def __init__(self, posterior: Posterior, branches: list[Branch]) -> None:
        self.posterior, self.batches = posterior, 0
        self.found = {(b.site.name, n): posterior.of(b.site.name, n) for b in branches for n in ("A", "B")}
        self.found = {key: Kronecker(torch.zeros_like(k.wide), torch.zeros_like(k.square)) for key, k in self.found.items()}
        self.tokens = dict.fromkeys((b.site.name for b in branches), 0)
        self.counted: dict[str, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def add(self, site: str, seen: Seen) -> None:
        """One backward through a site. Inputs count once a forward, gradients at every class."""
        real = seen.dy.flatten(0, -2).abs().amax(-1) > 0
        x, dz, z, dy = (t.flatten(0, -2).to(self.posterior.variance.dtype) for t in seen)
        fresh = real & ~self._counted(site, real)
        a, b = self.found[site, "A"], self.found[site, "B"]
        a_wide, b_square = (updated(a.wide, x[fresh]), b.square + z[fresh].T @ z[fresh]) if fresh.any() else (a.wide, b.square)
        self.tokens[site] += int(fresh.sum())
        self.found[site, "A"] = Kronecker(a_wide, a.square + dz[real].T @ dz[real])
        self.found[site, "B"] = Kronecker(updated(b.wide, dy[real]), b_square)

    def _counted(self, site: str, real: Tensor) -> Tensor:
        """Which inputs of this forward have been counted at an earlier class: a class of probability 0 sends no gradient. Now these are."""
        batch, mask = self.counted.get(site, (-1, real))
        before = mask if batch == self.batches and mask.shape == real.shape else torch.zeros_like(real)
        self.counted[site] = self.batches, before | real
        return before

    @torch.no_grad()
    def store(self, run: Run) -> None:
        """Put the sums of all processes into the posterior."""
        for (site, name), k in self.found.items():
            tokens = torch.tensor(float(self.tokens[site]))
            run.total_(tokens)
            wide, square = self._whole(k.wide, run), k.square.clone()
            run.total_(square)
            self.posterior.set_(site, name, Kronecker(wide, square / max(1.0, tokens.item())))

    def _whole(self, wide: Tensor, run: Run) -> Tensor:
        if run.processes == 1:
            return wide
        gram = wide @ wide.T
        run.total_(gram)
        values, vectors = torch.linalg.eigh(gram)
        k = wide.shape[1]
        kept: Tensor = vectors[:, -k:] * values[-k:].clamp_min(0).sqrt()
        return kept


@torch.no_grad()
def most_evident(posterior: Posterior, branches: list[Branch]) -> float:
    """The prior variance of highest evidence."""
    evidence = torch.zeros_like(GRID)
    for branch in branches:
        for name in ("A", "B"):
            theta: Tensor = getattr(branch.delta, name)
            k = Kronecker(*(t.double().cpu() for t in posterior.of(branch.site.name, name)))
            evidence -= theta.double().square().sum().cpu() / (2 * GRID) + k.log_det(GRID) / 2
    return float(GRID[evidence.argmax()])
