"""Laplace-LoRA's acceptance properties (arXiv:2308.13111)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit
from lorakit import Adapted, attach, get_method
from lorakit.bayes.predict import class_logits, predict
from lorakit.bayes.score import expected_calibration_error, figures, score
from lorakit.core.calibrate import Calibration
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.events import Scored
from lorakit.parts.posterior import fit as module
from lorakit.parts.posterior.factors import NAME, Posterior
from lorakit.parts.posterior.fit import Laplace
from tests.laws.subject import base, far, same_bits, subject
from tests.methods.tools import normal


class Classifier(nn.Module):
    """One linear layer with its inputs named as a Transformers model names its own."""

    def __init__(self, d: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.w = nn.Linear(d, classes, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return type("Out", (), {"logits": self.w(x)[:, -1]})


class Toy:
    """A run that has been trained: what the controller's end asks for."""

    processes = 1

    def __init__(self, adapted: Adapted, x: Tensor, y: Tensor, size: int = 4) -> None:
        self.adapted, self.data = adapted, [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]

    def calibration(self, n: int) -> Calibration:
        return Calibration([{"x": x, "labels": y} for x, y in self.data])

    def scored(self, batch: Any) -> Scored:
        logits = class_logits(self.adapted.model, batch)
        return Scored(F.cross_entropy(logits, batch["labels"], reduction="sum"), len(logits), logits, None)

    def total_(self, tensor: Tensor) -> None:
        """One process."""


def fitted(n: int = 1, tokens: int = 1, variance: float = 0.5, **kwargs: Any) -> tuple[Adapted, Tensor]:
    torch.manual_seed(0)
    model = Classifier()
    settings = {"n_kfac": 5, "prior_variance": variance, "r": 2, "alpha": 2.0} | kwargs
    adapted = attach(model, get_method("laplace_lora", sites="w", **settings))
    with torch.no_grad():
        for i, p in enumerate(adapted.params()):
            p.tensor.copy_(normal(*p.tensor.shape, seed=30 + i))
    x = normal(n, tokens, 5, seed=1)
    run = Toy(adapted, x, torch.arange(n) % 3)
    for spec in adapted.methods["default"].controllers:
        spec.build(run).finish()  # type: ignore[arg-type]
    return adapted, x


def ggn(adapted: Adapted, x: Tensor) -> dict[str, Tensor]:
    """The generalized Gauss-Newton matrix of each parameter, dense, by autograd."""
    out = {}
    for name in ("A", "B"):
        theta = adapted.branches()[0].delta.get_parameter(name)
        H = torch.zeros(theta.numel(), theta.numel(), dtype=torch.float64)
        logits = class_logits(adapted.model, {"x": x})
        for f in logits:
            p = f.detach().softmax(-1)
            J = torch.stack([torch.autograd.grad(f[c], theta, retain_graph=True)[0].flatten() for c in range(3)])
            H += J.T @ (p.diag() - p[:, None] * p) @ J
        out[name] = H
    return out


def curvature_error() -> float:
    adapted, x = fitted()
    posterior = adapted.shared("default")[NAME]
    assert isinstance(posterior, Posterior)
    want, errors = ggn(adapted, x), []
    for name in ("A", "B"):
        k = posterior.of("w", name)
        full = k.wide @ k.wide.T
        found = torch.kron(k.square, full) if name == "A" else torch.kron(full, k.square)
        errors.append(far(found, want[name]))
    return max(errors)


def test_for_one_example_kfac_is_the_exact_gauss_newton_matrix() -> None:
    assert curvature_error() < 1e-6


def test_an_input_counts_though_its_first_class_is_impossible() -> None:
    """p = 0 in floating point sends no gradient; the other classes do."""

    def inputs(first: float) -> Tensor:
        torch.manual_seed(0)
        model = Classifier()
        adapted = attach(model, get_method("laplace_lora", sites="w", n_kfac=5, prior_variance=0.5, r=2))
        with torch.no_grad():
            for i, p in enumerate(adapted.params()):
                p.tensor.copy_(normal(*p.tensor.shape, seed=30 + i))
        run, shift = Toy(adapted, normal(4, 1, 5, seed=1), torch.arange(4) % 3), torch.tensor([first, 0.0, 0.0], dtype=torch.float64)
        scored = run.scored
        run.scored = lambda b: (s := scored(b))._replace(outputs=s.outputs + shift)  # type: ignore[method-assign]
        (spec,) = adapted.methods["default"].controllers
        spec.build(run).finish()  # type: ignore[arg-type]
        posterior: Any = adapted.shared("default")[NAME]
        wide = posterior.of("w", "A").wide
        return wide @ wide.T

    assert far(inputs(-2000.0), inputs(0.0)) < 1e-9


def test_mutants_of_the_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:  # labels from the data, not from the model
        m.setattr(module, "fisher_terms", lambda logits, rng: [F.log_softmax(logits, -1)[:, 0].sum()])
        assert curvature_error() > 1e-2
    with monkeypatch.context() as m:  # probabilities, where their roots belong
        m.setattr(module, "fisher_terms", lambda z, rng: [(z.softmax(-1).detach()[:, c] * z.log_softmax(-1)[:, c]).sum() for c in range(3)])
        assert curvature_error() > 1e-2


def test_the_covariance_is_that_of_the_dense_posterior() -> None:
    """J (H + I/σ²)⁻¹ Jᵀ with everything dense, for examples it was not fitted on."""
    adapted, _ = fitted(n=6, tokens=2)
    posterior: Any = adapted.shared("default")[NAME]
    x = normal(3, 2, 5, seed=9)
    found = predict(adapted, {"x": x})
    want = torch.zeros(3, 3, 3, dtype=torch.float64)
    for name in ("A", "B"):
        theta = adapted.branches()[0].delta.get_parameter(name)
        k = posterior.of("w", name)
        full = k.wide @ k.wide.T
        H = torch.kron(k.square, full) if name == "A" else torch.kron(full, k.square)
        inverse = torch.linalg.inv(H + torch.eye(len(H), dtype=torch.float64) / 0.5)
        logits = class_logits(adapted.model, {"x": x})
        for b in range(3):
            J = torch.stack([torch.autograd.grad(logits[b, c], theta, retain_graph=True)[0].flatten() for c in range(3)])
            want[b] += J @ inverse @ J.T
    assert far(found.covariance, want) < 1e-5
    assert far(found.mean, class_logits(adapted.model, {"x": x}).detach()) < 1e-12


def test_without_prior_variance_it_is_the_map_and_the_mean_logits_keep_its_class() -> None:
    adapted, _ = fitted(n=6)
    x = normal(20, 1, 5, seed=9)
    exact = class_logits(adapted.model, {"x": x}).detach().softmax(-1)
    assert far(predict(adapted, {"x": x}, variance=1e-14).probabilities(), exact) < 1e-5
    found = predict(adapted, {"x": x})
    assert (found.mean.argmax(-1) == exact.argmax(-1)).all()
    assert far(found.probabilities(), exact) > 1e-2
    assert same_bits(found.probabilities(seed=3), found.probabilities(seed=3))


def test_averaging_logits_would_cancel_the_posterior() -> None:
    """The reference example's defect: mean over draws of f is f_MAP; mean over softmax is not."""
    adapted, _ = fitted(n=6, variance=5.0)
    found = predict(adapted, {"x": normal(4, 1, 5, seed=9)})
    assert (found.probabilities(20_000) - found.mean.softmax(-1)).abs().max() > 0.02


def test_the_prior_variance_maximizes_the_evidence() -> None:
    adapted, _ = fitted(n=12, variance=0.0)
    posterior: Any = adapted.shared("default")[NAME]
    best = posterior.fitted
    delta = adapted.branches()[0].delta

    def evidence(v: float) -> float:
        total = 0.0
        for name in ("A", "B"):
            k, theta = posterior.of("w", name), delta.get_parameter(name).detach()
            total -= float(theta.square().sum()) / (2 * v) + float(k.log_det(torch.tensor([v], dtype=torch.float64))) / 2
        return total

    assert 1e-7 < best < 1e5
    assert evidence(best) >= max(evidence(best * 1.2), evidence(best / 1.2))


def trained_on_separable(seed: int) -> tuple[Adapted, Tensor, Tensor]:
    """An overconfident classifier: two classes that a rank-1 adapter separates, trained far beyond that."""
    torch.manual_seed(seed)
    model = Classifier(classes=2)
    with torch.no_grad():
        model.w.weight.zero_()
    adapted = attach(model, get_method("laplace_lora", r=2, alpha=2.0, n_kfac=5, sites="w"), seed=seed)
    x = normal(24, 1, 5, seed=seed)
    y = (x[:, 0, 0] + 0.8 * normal(24, seed=seed + 50) > 0).long()
    optimizer = torch.optim.Adam([p.tensor for p in adapted.params()], lr=0.1)
    for _ in range(300):
        loss = F.cross_entropy(class_logits(model, {"x": x}), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for spec in adapted.methods["default"].controllers:
        spec.build(Toy(adapted, x, y)).finish()  # type: ignore[arg-type]
    test = normal(400, 1, 5, seed=seed + 99)
    return adapted, test, (test[:, 0, 0] + 0.8 * normal(400, seed=seed + 150) > 0).long()


def test_it_wins_on_an_overconfident_classifier() -> None:
    """NLL and calibration error on new data fall, confidence far from the data falls most; all of three seeds."""
    for seed in range(3):
        adapted, x, y = trained_on_separable(seed)
        found = predict(adapted, {"x": x})
        plain, averaged = figures(found.mean.softmax(-1), y), figures(found.probabilities(), y)
        assert averaged["nll"] < plain["nll"]
        assert averaged["ece"] < plain["ece"]
        far_away = predict(adapted, {"x": 10 * x})
        gap = far_away.mean.softmax(-1).amax(-1).mean() - far_away.probabilities().amax(-1).mean()
        assert gap > plain["confidence"] - averaged["confidence"] - 0.05
        assert gap > 0.05


def test_it_loses_where_the_map_is_right_and_sure() -> None:
    """Noiseless data far from the boundary: confidence was deserved, and the posterior gives some of it away."""
    torch.manual_seed(0)
    adapted, x, _ = trained_on_separable(0)
    found = predict(adapted, {"x": x})
    y = found.mean.argmax(-1)
    assert figures(found.probabilities(), y)["nll"] > figures(found.mean.softmax(-1), y)["nll"]


def test_calibration_error_in_closed_form() -> None:
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], dtype=torch.float64)
    assert expected_calibration_error(p, torch.tensor([0, 0, 0, 1])) == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
    assert expected_calibration_error(p, torch.tensor([1, 1, 1, 1])) == pytest.approx((2 * 0.9 + 2 * 0.6) / 4)


def test_the_adapter_is_lora_with_a_posterior_beside_it(tmp_path: Path) -> None:
    adapted = subject("laplace_lora", awake=False)
    lora = subject("lora", awake=False)
    mine = adapted.tensors("default")
    assert all(same_bits(mine[k], v) for k, v in lora.tensors("default").items())
    assert all(k.startswith("lora_shared.posterior.") for k in mine.keys() - lora.tensors("default").keys())
    with pytest.raises(Incompatible, match="saved before"):
        predict(adapted, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})
    adapted.save(tmp_path / "a")
    again = lorakit.load(base(), tmp_path / "a")
    assert all(same_bits(again.tensors("default")[k], v) for k, v in mine.items())
    with pytest.raises(Incompatible, match="has no posterior"):
        predict(lora, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(BadParameter, match="n_kfac=0"):
        get_method("laplace_lora", n_kfac=0)
    with pytest.raises(BadParameter, match="prior_variance=-1"):
        Laplace(-1.0, 0)


def test_another_kind_of_update_is_refused_before_training_and_not_after() -> None:
    from tests.laws.steps import Run

    for name in ("laplace_lora+pissa", "laplace_lora+relora", "adalora+laplace_lora"):
        with pytest.raises(Incompatible, match="plain pairs"):
            Run(subject(name, awake=False), total=4)


@pytest.mark.slow
def test_it_calibrates_a_real_classifier(tmp_path: Path) -> None:
    """On the built-in classification task, overtrained on few rows: NLL and calibration error on held-out rows fall."""
    from lorakit.serve.open import open_adapter
    from lorakit.serve.score import prepared
    from lorakit.train.config import make_config
    from lorakit.train.train import train

    config = make_config({
        "method": "laplace_lora", "train_data": "builtin:classify", "max_train_samples": 64, "max_steps": 60, "learning_rate": 5e-3,
        "max_length": 64, "per_device_train_batch_size": 16, "max_eval_samples": 120, "save_steps": 0, "output_dir": str(tmp_path / "out"),
        "sites": "qv", "r": 4,
    })  # fmt: skip
    train(config, quiet=True)
    opened = open_adapter(tmp_path / "out" / "adapter")
    data = prepared(opened, "builtin:classify", limit=120)
    assert opened.adapted is not None
    found = score(opened.adapted, data.valid, batch_size=16)
    assert found["posterior_nll"] < found["nll"]
    assert found["posterior_ece"] < found["ece"]
    assert found["posterior_accuracy"] >= found["accuracy"] - 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_fitted_too(tmp_path: Path) -> None:
    """Its own backward could run once only; the posterior needs one a class."""
    from lorakit.adapters.io import load_adapter
    from lorakit.train.train import train
    from tests.train.runs import class_file, config

    found = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        keys = {
            "method": "laplace_lora",
            "train_data": class_file(tmp_path / "c.jsonl"),
            "sites": ["q_proj"],
            "max_steps": 2,
            "save_steps": 0,
        }
        train(config(tmp_path, output_dir=str(out), torch_compile=compiled, **keys), quiet=True)
        found.append(load_adapter(out / "adapter").tensors["lora_shared.posterior.variance"])
    assert found[0] > 0
    assert far(found[1], found[0]) < 0.05
