"""Derivative-free LoRA's acceptance properties (arXiv:2403.01754)."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, attach, get_method
from lorakit.core.calibrate import Calibration
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.events import Step
from lorakit.methods.learning import dfo_lora as module
from lorakit.methods.learning.dfo_lora import AskTell, clipped_std
from tests.laws.steps import Run
from tests.laws.subject import base, batch, logits, same_bits, subject
from tests.methods.tools import normal, teacher

SMALL: dict[str, Any] = {"population": 6, "d": 32}


def run_of(**kwargs: Any) -> Run:
    return Run(subject("dfo_lora", awake=False, **(SMALL | kwargs)), total=8)


def test_no_graph_is_ever_built_and_the_budget_is_exact() -> None:
    saved: list[Tensor] = []
    run = run_of()
    calls = 0
    loss = run.loss

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return loss(*args)

    run.loss = counted  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run.steps(8)
    assert not saved
    assert calls == 8 * 6 + 2, "and the base itself, once a layer"
    assert all(p.tensor.grad is None for p in run.adapted.params())


def test_mutant_a_loss_with_a_graph_is_seen() -> None:
    saved: list[Tensor] = []
    run = run_of()
    model = run.adapted.model
    run.loss = lambda batches, info: (model(**batches[0], labels=batches[0]["input_ids"]).loss.item(), 1)  # type: ignore[method-assign, index]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run.step()
    assert saved


def test_z_zero_is_the_base_and_layers_take_turns() -> None:
    run = run_of()
    want = logits(base(), batch())
    assert same_bits(logits(run.adapted.model.eval(), batch()), want)
    first, second = run.loop.layers  # type: ignore[attr-defined]
    run.step()
    assert first.loss <= first.start
    first.set_(np.ones_like(first.best))
    assert all(t.any() for _, _, t in first.tensors)
    assert not any(t.any() for _, _, t in second.tensors)
    for layer in (first, second):
        layer.set_(np.zeros_like(layer.best))
    assert same_bits(logits(run.adapted.model.eval(), batch()), want)


def test_a_seed_decides_everything_and_a_resume_is_exact() -> None:
    for kwargs in ({}, {"algorithm": "fireworks"}, {"keep": "mean"}):
        straight = run_of(**kwargs).steps(6)
        again = run_of(**kwargs).restore(run_of(**kwargs).steps(3).state()).steps(3)
        for name, tensor in straight.adapted.tensors("default").items():
            assert same_bits(tensor, again.adapted.tensors("default")[name]), (kwargs, name)


class Toy:
    """A run on one linear layer. `judge` sees the layer's output and says a loss, of any kind."""

    def __init__(self, judge: Any, total: int, **kwargs: Any) -> None:
        model = nn.ModuleDict({"w": nn.Linear(6, 5, bias=False)})
        with torch.no_grad():
            model["w"].weight.copy_(normal(5, 6, seed=3))
        self.W = model["w"].weight.detach().clone()
        self.x = normal(64, 6, seed=4, dtype=torch.float32)
        settings = {"d": 22, "spread": 1.0, "population": 12, "r": 1, "alpha": 1.0} | kwargs
        self.adapted: Adapted = attach(model, get_method("dfo_lora", sites="w", **settings))
        self.total, self.judge, self.calls = total, judge, 0
        self.loop: AskTell = self.adapted.methods["default"].loop.build(self)  # type: ignore[arg-type, assignment]

    def stream(self) -> Any:
        return iter(lambda: [{}], None)

    processes = 1

    def total_(self, tensor: Tensor) -> None:
        """One process."""

    def calibration(self, n: int) -> Calibration:
        return Calibration([{}], lambda model, _: (model["w"](self.x).sum(), 1))

    @torch.no_grad()
    def loss(self, batches: Any, info: Step) -> tuple[float, int]:
        self.calls += 1
        return float(self.judge(self.adapted.model["w"](self.x), self)), 1

    def search(self) -> float:
        return [self.loop.step(Step(i, self.total))[0] for i in range(self.total)][-1]


def target(toy: Toy) -> Tensor:
    return toy.x @ (toy.W + teacher(5, 6, [2.0], seed=7).float()).T


def squared(out: Tensor, toy: Toy) -> Tensor:
    return (out - target(toy)).square().mean()


def test_it_finds_planted_weights_of_rank_one() -> None:
    start = Toy(squared, 1).loss([], Step(0, 1))[0]
    toy = Toy(squared, 150)
    toy.search()
    best = toy.loop.layers[0].loss
    assert best < 1e-3 * start
    assert toy.calls == 150 * 12 + 1


def counts(out: Tensor, toy: Toy) -> Tensor:
    """How many outputs have another largest entry than the target's: nothing to differentiate."""
    return (out.argmax(-1) != target(toy).argmax(-1)).float().sum()


def test_it_wins_where_the_loss_has_no_gradient() -> None:
    toy = Toy(counts, 80)
    start = toy.loss([], Step(0, 1))[0]
    toy.search()
    assert start >= 8
    assert toy.loop.layers[0].loss <= 0.4 * start
    with torch.enable_grad():
        out = toy.adapted.model["w"](toy.x)
        assert not counts(out, toy).requires_grad


def test_it_loses_to_a_gradient_by_the_forwards_it_needs() -> None:
    """As many forwards, spent on gradient steps, end far lower."""
    toy = Toy(squared, 10)
    toy.search()
    model = nn.ModuleDict({"w": nn.Linear(6, 5, bias=False)})
    model["w"].weight.data.copy_(toy.W)
    lora = attach(model, get_method("lora", r=1, alpha=1.0, sites="w"))
    optimizer = torch.optim.Adam([p.tensor for p in lora.params()], lr=0.1)
    for _ in range(toy.calls):
        loss = (model["w"](toy.x) - target(toy)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * toy.loop.layers[0].loss


def test_fireworks_find_them_too() -> None:
    toy = Toy(squared, 150, algorithm="fireworks")
    start = toy.loss([], Step(0, 1))[0]
    toy.search()
    assert toy.loop.layers[0].loss < 0.05 * start


def test_it_never_ends_worse_than_the_base_on_its_own_batch() -> None:
    """Candidates far off (a large spread) do not displace z = 0."""
    toy = Toy(squared, 6, spread=100.0)
    start = toy.loss([], Step(0, 1))[0]
    toy.search()
    assert toy.loss([], Step(0, 1))[0] == start
    free = Toy(squared, 6, spread=100.0, keep="mean")
    free.search()
    assert free.loss([], Step(0, 1))[0] > start


def test_the_maps_have_the_width_of_the_inputs() -> None:
    toy = Toy(squared, 1)
    (layer,) = toy.loop.layers
    want = clipped_std(toy.x.flatten()) / 22**0.5
    for found in layer.maps:
        assert found.std().item() == pytest.approx(want, rel=0.25)
    x = torch.cat([normal(10_000, seed=1), torch.full((20,), 1e3, dtype=torch.float64)])
    assert clipped_std(x) < 0.1 * x.std()
    assert clipped_std(normal(10_000, seed=1)) == pytest.approx(1.0, rel=0.05)


def test_impossible_searches_are_refused() -> None:
    for kwargs in ({"d": 2}, {"population": 2}, {"sigma": 0.0}):
        with pytest.raises(BadParameter, match="at least 4"):
            module.dfo_lora(**kwargs)  # type: ignore[arg-type]


def test_what_a_search_would_ignore_or_undo_is_refused() -> None:
    for name in ("dfo_lora+lora_fa", "dfo_lora+pissa", "dfo_lora+increlora", "vera+dfo_lora"):
        with pytest.raises(Incompatible, match="from zero, and nothing else"):
            Run(subject(name, awake=False), total=20)
    with pytest.raises(Incompatible, match="no gradient step"):
        Run(subject("dfo_lora+loraplus", awake=False), total=20)


def test_processes_have_the_same_maps_though_one_has_no_batch() -> None:
    """Each measures its own batch; a process without one takes the others' widths."""

    def width(batches: list[dict[str, Any]], others: tuple[float, float]) -> float:
        toy = Toy(squared, 1)
        toy.processes = 2
        toy.total_ = lambda t: t.add_(torch.tensor([others], dtype=t.dtype))  # type: ignore[method-assign]
        data = toy.calibration(1)
        toy.calibration = lambda n: replace(data, batches=batches)  # type: ignore[method-assign]
        return module.input_widths(toy, toy.adapted.branches())["w"]  # type: ignore[arg-type]

    mine = clipped_std(normal(64, 6, seed=4, dtype=torch.float32).flatten())
    assert width([{}], (0.0, 0.0)) == pytest.approx(mine)
    assert width([{}], (3.0, 1.0)) == pytest.approx((mine + 3) / 2)
    assert width([], (3.0, 1.0)) == 3.0
