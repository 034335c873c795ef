"""Calibration: negative log-likelihood, expected calibration error and confidence, of the mean adapter and of its posterior."""

import torch
from torch import Tensor

from lorakit.bayes.predict import predict
from lorakit.core.attach import Adapted
from lorakit.core.errors import DataError
from lorakit.train.dataset import Side
from lorakit.train.evaluate import to


def score(adapted: Adapted, side: Side, *, batch_size: int = 8, samples: int = 1000) -> dict[str, float]:
    """{accuracy, nll, ece, confidence} of the mean adapter, and the same with `posterior_` in front. Classification data only."""
    if side.n_bytes:
        raise DataError("the posterior's calibration is scored on classes: give {text, label} rows, e.g. builtin:classify")
    device = next(adapted.model.parameters()).device
    plain, averaged, truth = [], [], []
    for batch in side.batches(batch_size):
        found = predict(adapted, to(batch, device))
        plain.append(found.mean.double().softmax(-1).cpu())
        averaged.append(found.probabilities(samples))
        truth.append(batch["labels"])
    labels = torch.cat(truth)
    mean, posterior = figures(torch.cat(plain), labels), figures(torch.cat(averaged), labels)
    return mean | {f"posterior_{name}": value for name, value in posterior.items()}


def figures(p: Tensor, labels: Tensor) -> dict[str, float]:
    """Of probabilities [n, c] and labels [n]."""
    right = (p.argmax(-1) == labels).double()
    return {
        "accuracy": right.mean().item(),
        "nll": -p.gather(1, labels[:, None]).clamp_min(1e-30).log().mean().item(),
        "ece": expected_calibration_error(p, labels),
        "confidence": p.amax(-1).mean().item(),
    }


def expected_calibration_error(p: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over equal bins of confidence, weighted by their size."""
    confidence, right = p.amax(-1), (p.argmax(-1) == labels).double()
    at = (confidence * bins).long().clamp_max(bins - 1)
    gaps = [(confidence[at == i].sum() - right[at == i].sum()).abs() for i in range(bins)]
    return float(torch.stack(gaps).sum()) / len(labels)
