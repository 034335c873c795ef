"""A new adapter from a mixture of old ones: six functions whose updates span a space, and a new task made of two of them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit import Adapter
from lorakit.adapters.io import save_adapter
from lorakit.adapters.mix import mix
from lorakit.core.attach import attach_adapter
from lorakit.core.errors import BadParameter
from lorakit.train.weights import Start, first_order, init_from_mixture, learned_composition, lorahub
from lorakit.train.weights.objective import Objective, mean_loss
from tests.adapters.subject import logits, tiny_model
from tests.train.weights.world import D_IN, adapter, bits, close, dense, layer, same_bits, some, toward, update, with_adapter

TEACHERS = [update(i) for i in range(6)]
NEW = 0.6 * dense(TEACHERS[1]) + 0.4 * dense(TEACHERS[4])
FREE = partial(learned_composition, by="model", normalize="none", steps=200)


def examples(target: Tensor, seed: int, n: int = 16) -> Objective:
    """y = (W + target) x on n random x, squared error, a label for each x."""
    x = torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    W, b = layer()["w"].weight.detach(), layer()["w"].bias.detach()

    def loss(model: nn.Module) -> Iterable[tuple[Tensor, int]]:
        return [((model["w"](x) - x @ (W + target).T - b).square().sum(), n)]

    return loss


def old() -> list[Adapter]:
    return [adapter(f) for f in TEACHERS]


def course(start: Adapter, task: Objective, steps: int) -> list[float]:
    """The loss before each step of training on from an adapter, and after the last."""
    model = layer()
    adapted = attach_adapter(model, start)
    optimizer = torch.optim.Adam([p.tensor for p in adapted.params()], lr=1e-2)
    losses = []
    for _ in range(steps + 1):
        ((loss, n),) = task(model)
        losses.append(loss.item() / n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def fresh(r: int) -> Adapter:
    method = lorakit.get_method("lora", r=r, alpha=float(r), sites="w")
    return lorakit.attach(layer(), method).state()


@pytest.mark.parametrize("how", [partial(lorahub, budget=400, l1=0.0), FREE], ids=["lorahub", "learned"])
def test_weights_are_recovered_from_16_examples(how) -> None:
    start = init_from_mixture(layer(), old(), examples(NEW, 0), how=how, judge=examples(NEW, 1))
    assert start.found.weights == pytest.approx([0, 0.6, 0, 0, 0.4, 0], abs=0.1)
    assert start.helps and start.loss < 0.05 * start.base
    assert start.adapter.meta["start"]["helps"] is True


def test_it_is_ahead_of_a_fresh_adapter() -> None:
    task, judge = examples(NEW, 0), examples(NEW, 1)
    start = init_from_mixture(layer(), old(), task, how=FREE, rank=4, judge=judge)
    begun, usual = course(start.adapter, task, 100), course(fresh(4), task, 600)
    assert begun[0] < usual[50]
    goal = 0.01 * usual[0]
    assert 3 * next(i for i, loss in enumerate(begun) if loss < goal) <= next((i for i, loss in enumerate(usual) if loss < goal), 600)


def test_an_unrelated_task_gets_a_fresh_adapter() -> None:
    basis = torch.linalg.qr(torch.stack([dense(f).flatten() for f in TEACHERS], 1)).Q
    other = dense(update(50)).flatten()
    unrelated = (other - basis @ (basis.T @ other)).view_as(NEW)
    start = init_from_mixture(layer(), old(), examples(unrelated, 0), how=FREE, judge=examples(unrelated, 1, 200), rank=3, seed=5)
    assert not start.helps and start.loss >= start.base
    assert start.adapter.meta["start"]["helps"] is False
    assert not {"mix", "search", "metrics"} & start.adapter.meta.keys(), "it is made of nothing"
    f = start.adapter.factors()["w"]
    assert f.A.shape == (3, D_IN) and f.A.abs().min() > 0 and (f.B == 0).all()
    method = lorakit.get_method("lora", r=3, alpha=3.0, sites="w")
    assert torch.equal(f.A, lorakit.attach(layer(), method, seed=5).state().tensors["w.A"].float())


@pytest.mark.parametrize("rank", [None, 2, 4, 8])
def test_the_start_is_the_mixture_cut_to_the_rank_and_no_component_is_dead(rank: int | None) -> None:
    start = init_from_mixture(layer(), old(), examples(NEW, 0), how=FREE, rank=rank)
    wanted = dense(start.found.adapter.factors()["w"])
    U, S, Vh = torch.linalg.svd(wanted)
    q = rank or 10
    f = start.adapter.factors()["w"]
    assert f.A.shape == (q, D_IN) and f.s == 1
    assert close(dense(f), U[:, :q] * S[:q] @ Vh[:q], 1e-5)
    assert (f.A.norm(dim=1) > 1e-4).all()
    assert start.loss == pytest.approx(mean_loss_with(start.adapter, examples(NEW, 0)), rel=1e-5)


def test_a_rank_larger_than_the_mixtures_is_filled_as_lora_starts() -> None:
    start = init_from_mixture(layer(), old()[:2], examples(dense(TEACHERS[1]), 0), how=FREE, rank=7)
    f = start.adapter.factors()["w"]
    assert f.A.shape == (7, D_IN) and (f.B[:, 4:] == 0).all() and (f.A[4:].norm(dim=1) > 1e-2).all()
    assert start.helps and close(dense(f), dense(start.found.adapter.factors()["w"]))


def mean_loss_with(one: Adapter, objective: Objective) -> float:
    model = layer()
    attach_adapter(model, one)
    return mean_loss(objective, model)


def test_an_adapter_without_a_site_leaves_it_fresh_and_not_dead() -> None:
    model = tiny_model("llama")
    adapters = [*some(n=1, sites="attention"), *some(n=1, seed=4, sites="attention")]
    adapters[1].tensors["model.layers.1.self_attn.v_proj.B"].zero_()
    adapters[0].tensors["model.layers.1.self_attn.v_proj.B"].zero_()
    target = with_adapter(model, mix(adapters, weights=[0.7, 0.2]))
    start = init_from_mixture(model, adapters, toward(target), how="nnls", rank=3)
    f = start.adapter.factors()["model.layers.1.self_attn.v_proj"]
    assert f.A.shape[0] == 3 and (f.A.norm(dim=1) > 1e-2).all() and (f.B == 0).all()
    assert start.helps


@pytest.mark.parametrize(("arch", "sites"), [("llama", ("embed_tokens", "q_proj")), ("mixtral", "all-linear")])
def test_it_trains_on_from_there(arch: str, sites: str, tmp_path: Path) -> None:
    model, adapters = tiny_model(arch), some(arch, n=2, r=2, sites=sites)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before, target = bits(adapters), with_adapter(model, mix(adapters, weights=[0.5, 0.6]))
    start = init_from_mixture(model, adapters, toward(target), rank=6)
    assert start.helps and same_bits(before, adapters)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    save_adapter(start.adapter, tmp_path / "start")
    adapted = lorakit.load(model, tmp_path / "start")
    assert adapted.params().numel() == sum(t.numel() for t in start.adapter.tensors.values())
    cut = mix([start.found.adapter], "svd", weights=[1.0], rank=6)
    shown = logits(model)
    adapted.detach()
    assert close(shown, with_adapter(model, cut), 1e-5)
    adapted = lorakit.load(model, tmp_path / "start")
    sum(loss for loss, _ in toward(target)(model)).backward()
    grads = [p.tensor.grad for p in adapted.params()]
    assert all(g is not None and g.abs().max() > 0 for g in grads)


def test_where_it_was_made_is_kept() -> None:
    start: Start = init_from_mixture(layer(), old(), examples(NEW, 0), how="nnls", rank=2)
    assert start.adapter.meta["start"]["how"] == "nnls"
    assert start.adapter.meta["mix"]["how"] == "svd" and start.adapter.meta["mix"]["lost"]["total"] > 0.01
    assert len(start.adapter.meta["mix"]["sources"][0]["mix"]["sources"]) == 6


def test_ways_and_ranks_that_there_are_not() -> None:
    with pytest.raises(BadParameter, match="no way to find weights is called 'lorahob'. Did you mean 'lorahub'"):
        init_from_mixture(layer(), old(), examples(NEW, 0), how="lorahob")
    with pytest.raises(BadParameter, match="rank=0 is not possible"):
        init_from_mixture(layer(), old(), examples(NEW, 0), how=first_order, rank=0)
