"""LoRA-GA's acceptance properties (arXiv:2407.05000)."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lorakit
from lorakit import Adapted, BadParameter, Incompatible, Method, attach, get_method
from lorakit.core.calibrate import Calibration
from lorakit.methods.learning import lora_ga
from lorakit.methods.learning.lora_ga import Direction, FromGradient, aligned
from tests.adapters import test_trajectory_peft as trajectory
from tests.adapters.subject import quiet
from tests.laws.subject import attached, base, batch, calibration, far, logits, same_bits, subject
from tests.methods.tools import gen, normal, teacher

DIRECTIONS: tuple[Direction, ...] = ("ArB2r", "A2rBr", "ArBr", "random")


def truncated(G: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def cosine(a: Tensor, b: Tensor) -> float:
    return ((a * b).sum() / a.norm() / b.norm()).item()


@pytest.mark.parametrize("shape", [(16, 12), (12, 16)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_step_is_the_best_of_rank_2r(direction: Direction, shape: tuple[int, int]) -> None:
    check_first_step(direction, shape)


def check_first_step(direction: Direction = "ArB2r", shape: tuple[int, int] = (16, 12), *, gamma: float = 4.0) -> None:
    """B₀B₀ᵀG + G A₀ᵀA₀ = c² SVD₂ᵣ(G), whichever half goes to A; both factors are c times orthonormal."""
    G, r = normal(*shape), 3
    A, B = aligned(G, r, FromGradient(direction, gamma=gamma, niter=0), gen(0))
    assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
    c2 = shape[0] ** 0.5 / gamma
    torch.testing.assert_close(B @ B.T @ G + G @ A.T @ A, c2 * truncated(G, 2 * r), atol=1e-12, rtol=0)
    for gram in (A @ A.T, B.T @ B):
        torch.testing.assert_close(gram, c2 * torch.eye(r, dtype=G.dtype), atol=1e-12, rtol=0)


def test_a_randomized_svd_is_as_good() -> None:
    G, r = teacher(60, 50, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]) + 0.01 * normal(60, 50), 3
    A, B = aligned(G, r, FromGradient(niter=4), gen(0))
    assert far(B @ B.T @ G + G @ A.T @ A, 60**0.5 / 16 * truncated(G, 2 * r)) < 1e-6


# --- on a layer: L = ½‖X W'ᵀ − Y‖² / n, so that G = (W' − W*) XᵀX / n ----------------------------------------------------------


def one_layer(method: Method, target: Tensor, X: Tensor, *, shown: Tensor | None = None, seed: int = 0) -> Adapted:
    """A linear layer that starts at W = 0 and whose best change is `target`; `shown`: what the calibration's best change is instead."""
    host = nn.Linear(target.shape[1], target.shape[0], bias=False).double()
    with torch.no_grad():
        host.weight.zero_()
    data = Calibration([{"x": X, "y": X @ (target if shown is None else shown).T}], lambda m, b: (loss(m, b), 1))
    return attach(nn.ModuleDict({"w": host}), method, calibration=data, seed=seed)


def loss(model: nn.Module, shown: Mapping[str, Tensor]) -> Tensor:
    return (model.w(shown["x"]) - shown["y"]).square().sum() / (2 * len(shown["x"]))


def step(adapted: Adapted, X: Tensor, target: Tensor, *, lr: float) -> None:
    """One step of plain gradient descent."""
    loss(adapted.model, {"x": X, "y": X @ target.T}).backward()
    with torch.no_grad():
        for p in adapted.params():
            p.tensor.sub_(lr * p.tensor.grad)
            p.tensor.grad = None


def first_change(method: Method, target: Tensor, X: Tensor, **kwargs: Any) -> Tensor:
    """ΔW after an infinitesimal step, divided by −η s²."""
    adapted = one_layer(method, target, X, **kwargs)
    (branch,) = adapted.branches()
    assert not branch.weight().any()
    step(adapted, X, target, lr=1e-7)
    return -branch.weight().detach() / (1e-7 * branch.delta.s**2)


def test_training_begins_with_the_best_of_rank_2r() -> None:
    """Through attach, autograd and a step; LoRA and PiSSA begin with less of the gradient's direction."""
    target, X = normal(10, 12), normal(40, 12, seed=1)
    G = -target @ X.T @ X / 40
    changes = {name: first_change(get_method(name, r=3, sites="w"), target, X) for name in ("lora_ga", "lora")}
    assert far(changes["lora_ga"], 10**0.5 / 16 * truncated(G, 6)) < 1e-4
    ideal = (truncated(G, 6).norm() / G.norm()).item()
    assert cosine(changes["lora_ga"], G) == pytest.approx(ideal, abs=1e-5)
    assert cosine(changes["lora"], G) < 0.7 * ideal
    ill = first_change(get_method("lora_ga", r=3, sites="w", peft_compat=True), target, X)
    assert cosine(ill, G) < ideal - 0.02


def test_it_wins_where_the_data_show_the_task() -> None:
    """Equal learning rates in ΔW: after a few steps of descent the loss is below LoRA's."""
    target, X = teacher(10, 12, [3.0, 2.0, 1.0, 0.5]), normal(60, 12, seed=1)
    left = {}
    for name in ("lora_ga", "lora"):
        adapted = one_layer(get_method(name, r=2, alpha=8.0, sites="w"), target, X)
        for _ in range(15):
            step(adapted, X, target, lr=0.02)
        left[name] = loss(adapted.model, {"x": X, "y": X @ target.T}).item()
    assert left["lora_ga"] < 0.5 * left["lora"]


def test_it_loses_where_they_mislead() -> None:
    """A calibration set that shows other directions: the first step does nothing, where LoRA's random A moves."""
    U, V = (torch.linalg.qr(normal(d, 8, seed=d)).Q for d in (10, 12))
    X = torch.linalg.qr(normal(40, 12, seed=1)).Q * 40**0.5  # whitened, so that gradients are the changes wanted
    target, other = U[:, :2] @ V[:, :2].T, U[:, 2:8] @ torch.diag(torch.arange(6.0, 0, -1).double()) @ V[:, 2:8].T
    misled = first_change(get_method("lora_ga", r=3, sites="w"), target, X, shown=other)
    assert misled.norm() < 1e-5
    assert first_change(get_method("lora", r=3, sites="w"), target, X).norm() > 1e-2


def test_a_small_gradient_is_as_good_as_a_large_one() -> None:
    """Only directions count; PEFT's B fades with the gradient."""
    G = normal(10, 12)
    for compat, same in ((False, True), (True, False)):
        spec = FromGradient(niter=0, peft_compat=compat)
        (A, B), (small_A, small_B) = aligned(G, 2, spec, gen(0)), aligned(1e-6 * G, 2, spec, gen(0))
        assert far(small_A, A) < 1e-8
        assert (far(small_B, B) < 1e-8) == same


# --- against PEFT ---------------------------------------------------------------------------------------------------------------


def their_start(arch: str, method: Method) -> tuple[Adapted, Any]:
    """(ours, PEFT's) from the same two batches; PEFT averages the batches' mean gradients."""
    shown = trajectory.batches()[:2]
    model = trajectory.base(arch)
    theirs = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=trajectory.TARGETS[arch], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )

    def train_step() -> None:
        for ids in shown:
            theirs(input_ids=ids, labels=ids).loss.backward()

    with quiet(), warnings.catch_warnings(action="ignore"):  # of Conv1D's fan_in_fan_out
        preprocess_loraga(theirs.eval(), config, train_step)
        theirs = peft.get_peft_model(theirs, config).train()
    data = Calibration([{"input_ids": ids, "labels": ids} for ids in shown])
    return attach(model.train(), method, calibration=data), theirs


def test_pefts_own_start() -> None:
    """`peft_compat`: A and B up to sign, to the precision of PEFT's fp32."""
    adapted, theirs = their_start("gpt_neox", get_method("lora_ga", r=4, alpha=8.0, peft_compat=True, niter=0))
    for name, ours, found in trajectory.counterparts(adapted, theirs):
        dim = 1 if name.endswith(".A") else 0
        assert (torch.cosine_similarity(ours, found, dim).abs() > 1 - 1e-3).all(), name
        torch.testing.assert_close(ours.norm(dim=dim), found.to(ours.dtype).norm(dim=dim), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("arch", trajectory.TARGETS)
def test_fifty_steps_as_in_peft(arch: str) -> None:
    assert max(run_both(arch, lambda m: m)) <= trajectory.TOLERANCE


def run_both(arch: str, change: Callable[[Method], Method]) -> tuple[float, float]:
    """The largest difference of losses and of tensors over 50 steps in fp64 from our start."""
    method = change(get_method("lora_ga", r=4, alpha=8.0))
    adapted, theirs = their_start(arch, method)
    with torch.no_grad():  # PEFT's base is its own residual by now: back to W, from which `same_start` takes ours
        for branch in adapted.branches():
            layer = theirs.get_submodule(f"base_model.model.{branch.site.name}").get_base_layer()
            layer.weight.copy_(branch.base.dense().T if trajectory.is_conv1d(layer) else branch.base.dense())
    trajectory.same_start(adapted, theirs)
    losses, reference = trajectory.train_ours(adapted, method), trajectory.train_theirs(theirs)
    assert reference[-1] < reference[0] - 0.1
    tensors = max((a - b).abs().max().item() for _, a, b in trajectory.counterparts(adapted, theirs))
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True)), tensors


def test_a_scale_wrong_in_the_sixth_digit_is_seen() -> None:
    assert min(run_both("gpt_neox", trajectory.scaled)) > trajectory.TOLERANCE


# --- on a model -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_it_is_plain_lora_of_twice_the_rank_on_the_untouched_base(arch: str) -> None:
    adapted = subject("lora_ga", arch, alpha=8.0)
    state, tensors = adapted.state(), {}
    for site in state.sites:
        t = state.of(site)
        tensors |= {f"{site.name}.A": torch.cat([t["A"], t["A0"]]), f"{site.name}.B": torch.cat([t["B"], -t["B0"]], 1)}
    plain = replace(state, recipe=lorakit.core.method.Recipe("lora", {"r": 8, "alpha": 16.0}), tensors=tensors)
    fresh = attach(base(arch), get_method("lora"), name="x").add("y", plain)
    assert far(logits(fresh.model, batch()), logits(adapted.model, batch())) < 1e-5


def test_the_start_is_that_of_the_gradient_that_the_calibration_gives() -> None:
    model = base()
    start = attached(model, get_method("lora_ga", r=2, sites="q_proj"))
    other = attach(base(), get_method("lora_ga", r=2, sites="q_proj"), calibration=calibration(1))
    again = attach(base(), get_method("lora_ga", r=2, sites="q_proj"), calibration=[dict(b) for b in calibration(4).batches])
    a, b, c = (x.tensors("default") for x in (start, other, again))
    assert all(same_bits(a[k], c[k]) for k in a)
    assert all(not torch.equal(a[k], b[k]) for k in a)


def test_what_has_no_start_is_refused() -> None:
    with pytest.raises(BadParameter, match="r <= 8"):
        attached(base(), get_method("lora_ga", r=9, sites="v_proj"))
    with pytest.raises(Incompatible, match="zero"):
        one_layer(get_method("lora_ga", r=2, sites="w"), torch.zeros(10, 12).double(), normal(20, 12))
    with pytest.raises(Incompatible, match="not finite"):
        one_layer(get_method("lora_ga", r=2, sites="w"), torch.full((10, 12), torch.nan).double(), normal(20, 12))
    for wrong in ({"gamma": 0.0}, {"niter": -1}, {"direction": "ArB"}):
        with pytest.raises(BadParameter):
            get_method("lora_ga", **wrong)


def _same_half_for_both(m: pytest.MonkeyPatch) -> None:
    m.setattr(lora_ga, "_halves", lambda direction, r, rng: (torch.arange(r), torch.arange(r)))


def _scaled_by_width_in(m: pytest.MonkeyPatch) -> None:
    m.setattr(lora_ga, "len", lambda G: G.shape[1], raising=False)


def _only_b_is_scaled(m: pytest.MonkeyPatch) -> None:
    real = lora_ga.aligned
    m.setattr(lora_ga, "aligned", lambda G, r, spec, rng: real(G, r, replace(spec, peft_compat=True), rng))
    m.setitem(globals(), "aligned", lora_ga.aligned)


def _singular_values_of_one_side(m: pytest.MonkeyPatch) -> None:
    real = lora_ga.principal
    m.setattr(lora_ga, "principal", lambda W, r, niter, rng, spare: real(W.abs(), r, niter, rng, spare=spare))


@pytest.mark.parametrize("change", [_same_half_for_both, _scaled_by_width_in, _only_b_is_scaled, _singular_values_of_one_side])
def test_mutants_are_seen(change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check_first_step()
