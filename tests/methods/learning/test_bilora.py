"""BiLoRA's acceptance properties (arXiv:2403.13037)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, attach, get_method
from lorakit.core.errors import BadParameter
from lorakit.core.events import Step
from lorakit.methods.learning import bilora as module
from lorakit.methods.learning.bilora import Bilevel, BilevelSpec, entropy
from lorakit.train.config import make_config
from lorakit.train.distributed import world
from lorakit.train.run import Run as RealRun
from lorakit.train.train import build
from tests.laws.steps import Run
from tests.laws.subject import awaken, far, same_bits, subject
from tests.methods.tools import normal, teacher


class Toy:
    """A run over one linear layer and two given batches: (x, target) each. It is what core.events.Run asks for."""

    def __init__(self, adapted: Adapted, fit: Any, judge: Any, lr: float, steps: int = 1) -> None:
        self.adapted, self.total, self.lr = adapted, steps, lr
        self.data = iter([fit, judge])
        self.optimizer = torch.optim.Adam([p.tensor for p in adapted.params()], lr=lr)
        self.calls: list[int] = []

    def stream(self, lo: float, hi: float) -> Any:
        data = next(self.data)
        return iter(lambda: data, None)

    def value(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.adapted.model["w"](x) - y).square().mean()

    def gradients(self, batch: Any, info: Step) -> tuple[float, int]:
        self.calls.append(id(batch))
        loss = self.value(batch)
        loss.backward()
        return loss.item(), 1

    def update(self, info: Step) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def toy(lr: float = 0.05, n: int = 40, noise: float = 0.0, **kwargs: Any) -> tuple[Toy, Bilevel, Any, Any]:
    model = nn.ModuleDict({"w": nn.Linear(8, 6, bias=False).double()})
    with torch.no_grad():
        model["w"].weight.copy_(normal(6, 8, seed=3))
    adapted = attach(model, get_method("bilora", r=4, alpha=4.0, sites="w", **kwargs))
    target = teacher(6, 8, [2.0])
    data = []
    for i in range(2):
        x = normal(n, 8, seed=10 + i)
        data.append((x, x @ (model["w"].weight.detach() + target).T + noise * normal(n, 6, seed=20 + i)))
    run = Toy(adapted, *data, lr)
    return run, adapted.methods["default"].loop.build(run), *data  # type: ignore[arg-type]


def exact(run: Toy, fit: Any, judge: Any, orth: float) -> list[Tensor]:
    """The hypergradient of one unrolled step, by autograd through the step."""
    (branch,) = run.adapted.branches()
    names = ("A", "B", "g")
    A, B, g = (getattr(branch.delta, n).detach().clone().requires_grad_(True) for n in names)
    W = run.adapted.model["w"].weight.detach()

    def loss(A: Tensor, B: Tensor, g: Tensor, batch: Any) -> Tensor:
        x, y = batch
        return (x @ (W + branch.delta.s * B @ (g[:, None] * A)).T - y).square().mean()

    def gram(G: Tensor) -> Tensor:
        return torch.linalg.norm(G - torch.eye(len(G), dtype=G.dtype))

    inner = loss(A, B, g, fit) + orth * (gram(A @ A.T) + gram(B.T @ B)) / 2
    dA, dB = torch.autograd.grad(inner, (A, B), create_graph=True)
    return list(torch.autograd.grad(loss(A - run.lr * dA, B - run.lr * dB, g, judge), (g,)))


def error(**kwargs: Any) -> float:
    run, loop, fit, judge = toy(**kwargs)
    awaken(run.adapted, size=0.5)
    before = {k: v.clone() for k, v in run.adapted.tensors("default").items()}
    (found,) = loop._hypergradient(fit, judge, Step(0, 1))
    assert all(same_bits(before[k], v) for k, v in run.adapted.tensors("default").items()), "nothing has moved"
    (want,) = exact(run, fit, judge, loop.spec.orth)
    return far(found, want)


def test_the_hypergradient_is_that_of_one_unrolled_step() -> None:
    assert error() < 1e-4
    assert error(orth=0.0) < 1e-4


def test_mutants_of_the_hypergradient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(unrolled=False) > 1e-2, "the first-order form is another one"
    with monkeypatch.context() as m:
        lower = Bilevel._lower_gradients
        m.setattr(Bilevel, "_lower_gradients", lambda self, fit, info: (lower(self, fit, info), self._clear())[0])
        assert error() > 1e-2
    with monkeypatch.context() as m:
        at = Bilevel._at
        m.setattr(Bilevel, "_at", lambda self, before, v, eps, fit, info: at(self, before, v, abs(eps), fit, info))
        assert error() > 1e-2


def test_each_group_learns_from_its_own_split_alone() -> None:
    """The vectors' step sees D1 only; with the first-order form the values' step sees D2 only."""
    run, loop, fit, judge = toy(unrolled=False, orth=0.0)
    awaken(run.adapted)
    updates: list[dict[str, Tensor]] = []

    def update(info: Step) -> None:
        updates.append({p.role: p.tensor.grad.clone() for p in run.adapted.params() if p.tensor.grad is not None})
        run.adapted.model.zero_grad()

    run.update = update  # type: ignore[method-assign]
    loop.step(Step(0, 1))
    assert [sorted(u) for u in updates] == [["g"], ["A", "B"]]
    run.adapted.model.zero_grad()
    run.value(judge).backward()
    grads = {p.role: p.tensor.grad.clone() for p in run.adapted.params()}
    assert same_bits(updates[0]["g"], grads["g"])
    run.adapted.model.zero_grad()
    run.value(fit).backward()
    grads = {p.role: p.tensor.grad.clone() for p in run.adapted.params()}
    assert same_bits(updates[1]["A"], grads["A"])
    assert same_bits(updates[1]["B"], grads["B"])


def test_the_two_shares_of_the_data_are_disjoint_and_whole(tmp_path: Any) -> None:
    config = make_config(
        {"method": "bilora", "train_data": "builtin:tkinter/chat", "max_train_samples": 37, "packing": False, "max_steps": 4}
    )
    parts = build(config, world())
    run = RealRun(parts.adapted, parts.data, config, world(), out=None, quiet=True)
    one, two = (set(stream.mine) for stream in run.streams)
    n = len(parts.data.train.items)
    assert not one & two
    assert one | two == set(range(n))
    assert len(two) == n - round(0.8 * n)


def test_softmax_values_are_a_distribution_and_the_start_is_the_base() -> None:
    for values, total in (("softmax", 1.0), ("binary", 2.0), ("real", 4.0)):
        adapted = subject("bilora", awake=False, values=values)
        for branch in adapted.branches():
            gate = torch.linalg.lstsq(branch.delta.A.T, branch.delta._gated().T).solution.diagonal()  # type: ignore[operator, union-attr]
            assert gate.sum().item() == pytest.approx(total, rel=1e-4)
        Run(adapted, total=4).steps(3)
        for branch in adapted.branches():
            gate = {"softmax": lambda g: g.softmax(0), "binary": torch.sigmoid, "real": lambda g: g}[values](branch.delta.g)
            assert far(branch.delta._gated(), gate[:, None] * branch.delta.A) < 1e-6  # type: ignore[operator]
            if values != "real":
                assert (gate >= 0).all()
            if values == "softmax":
                assert gate.sum().item() == pytest.approx(1.0, rel=1e-5)


def test_the_entropy_pushes_values_to_zero_or_one() -> None:
    adapted = subject("bilora", awake=False, values="binary")
    assert entropy(adapted).item() == pytest.approx(0.6931, abs=1e-3)
    awaken(adapted, size=1.0)
    for row in adapted.params().by_role("g"):
        row.tensor.grad = None
    entropy(adapted).backward()
    for row in adapted.params().by_role("g"):
        assert (row.tensor.grad * row.tensor <= 0).all(), "down the gradient, |logit| grows"


def generalization(method: str, seed: int, noise: float) -> float:
    """Test error after training on 24 noisy samples of a rank-1 change, with a rank that can fit the noise."""
    model = nn.ModuleDict({"w": nn.Linear(8, 6, bias=False).double()})
    target = teacher(6, 8, [2.0], seed=seed + 1)
    W = model["w"].weight.detach().clone()
    x, eps = normal(24, 8, seed=100 + seed), noise * normal(24, 6, seed=200 + seed)
    y = x @ (W + target).T + eps
    kwargs = {"orth": 0.0, "upper": 0.25} if method == "bilora" else {}
    adapted = attach(model, get_method(method, r=6, alpha=6.0, sites="w", **kwargs), seed=seed)
    run = Toy(adapted, (x[:18], y[:18]) if kwargs else (x, y), (x[18:], y[18:]), 0.02)
    loop = adapted.methods["default"].loop.build(run) if kwargs else None  # type: ignore[arg-type]
    for i in range(300):
        if loop is not None:
            loop.step(Step(i, 300))
        else:
            run.gradients((x, y), Step(i, 300))
            run.update(Step(i, 300))
    (branch,) = adapted.branches()
    return (branch.delta.weight() - target).square().sum().item()


def test_with_label_noise_it_wins() -> None:
    """Values chosen on held-back data overfit less than LoRA trained on all of it (catalogue, appendix E, item 9): all of three seeds."""
    assert all(generalization("bilora", seed, 2.0) < generalization("lora", seed, 2.0) for seed in range(3))


def test_without_noise_it_loses_by_the_data_it_holds_back() -> None:
    """Where there is nothing to overfit, LoRA on all the data is better."""
    worse = [generalization("bilora", seed, 0.0) > generalization("lora", seed, 0.0) for seed in range(3)]
    assert all(worse)


def test_a_resume_gives_the_same_bits_in_all_forms() -> None:
    for kwargs in ({}, {"unrolled": False}, {"values": "binary"}):
        straight = Run(subject("bilora", awake=False, **kwargs), total=6).steps(5)
        again = Run(subject("bilora", awake=False, **kwargs), total=6)
        again.restore(Run(subject("bilora", awake=False, **kwargs), total=6).steps(2).state()).steps(3)
        for name, tensor in straight.adapted.tensors("default").items():
            assert same_bits(tensor, again.adapted.tensors("default")[name]), name


def test_impossible_shares_are_refused() -> None:
    for upper in (0.0, 1.0, -0.1):
        with pytest.raises(BadParameter, match="not a share"):
            BilevelSpec(upper, True, 0.1, 0.0)
    assert module.FORMS.keys() == {"real", "softmax", "binary"}
