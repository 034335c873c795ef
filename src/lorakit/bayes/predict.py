"""Predictions under an adapter's posterior, by the linearized model: f ~ N(f_MAP, J Σ Jᵀ), probabilities are means of softmax(f)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.attach import Adapted
from lorakit.core.errors import Incompatible
from lorakit.parts.posterior.factors import NAME, Posterior
from lorakit.parts.posterior.trace import Seen, backward, traced

Logits = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class Predictive(NamedTuple):
    """A Gaussian over the class logits of each example."""

    mean: Tensor
    """f_MAP, [b, c]."""
    covariance: Tensor
    """[b, c, c]."""

    def probabilities(self, samples: int = 1000, *, seed: int = 0) -> Tensor:
        """Means of the softmax over draws: [b, c]. Averaging logits instead would give back the MAP."""
        eps = torch.empty(samples, *self.mean.shape, dtype=torch.float64).normal_(generator=random.generator(seed, NAME))
        values, vectors = torch.linalg.eigh(self.covariance.double().cpu())
        root = vectors * values.clamp_min(0).sqrt()[:, None, :]
        drawn = self.mean.double().cpu() + torch.einsum("bij,sbj->sbi", root, eps)
        return drawn.softmax(-1).mean(0)


def class_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """A classifier's outputs, [b, c]."""
    found: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return found


def predict(adapted: Adapted, batch: Mapping[str, Any], logits: Logits = class_logits, *, variance: float | None = None) -> Predictive:
    """The predictive of one batch; rows of the batch must not influence each other. `variance`: another prior's than the fitted one.

    For a language model choose among answers: `logits=lambda model, batch: model(**batch).logits[:, -1, token_ids]`.
    Raises Incompatible for an adapter without a posterior.
    """
    posterior = posterior_of(adapted)
    sigma2 = posterior.fitted if variance is None else variance
    branches = adapted.branches()
    model = adapted.model.eval()
    jacobians: dict[tuple[str, str], list[Tensor]] = {(b.site.name, n): [] for b in branches for n in ("A", "B")}

    def sink(site: str, seen: Seen) -> None:
        x, dz, z, dy = (t.flatten(1, -2).to(posterior.variance.dtype) for t in seen)
        jacobians[site, "A"].append(dz.mT @ x)
        jacobians[site, "B"].append(z.mT @ dy)

    with traced(branches, sink):
        mean = logits(model, batch)
        for c in range(mean.shape[-1]):
            backward(mean[:, c].sum(), branches)
    covariance = torch.zeros(*mean.shape, mean.shape[-1], dtype=torch.float64)
    for (site, name), rows in jacobians.items():
        if rows:
            k = posterior.of(site, name)
            covariance += k.covariance(torch.stack(rows, dim=1), sigma2).double().cpu()
    return Predictive(mean.detach(), covariance)


def posterior_of(adapted: Adapted) -> Posterior:
    """The active adapter's posterior."""
    (name,) = adapted.active
    found = adapted.shared(name).get(NAME)
    if not isinstance(found, Posterior):
        raise Incompatible(f"the adapter {name!r} has no posterior; train it with --method laplace_lora")
    return found
