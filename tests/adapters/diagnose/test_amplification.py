"""The factor is c for c times W's own strongest part, infinite where W does nothing, and the same however both are turned together."""

import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from lorakit.adapters.diagnose.amplification import amplification, amplifications, strongest
from lorakit.adapters.diagnose.update import Update, factored
from lorakit.core.base import base_of
from lorakit.core.delta import Factors
from lorakit.core.errors import AdapterMismatch
from lorakit.parts.bases.quantize import quantize
from tests.adapters.diagnose.subject import site
from tests.adapters.subject import shaken, tiny_model

SIDES = st.integers(2, 12)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(update: Update, W: Tensor):
    return amplification(site("x.q", *W.shape), update, W, name="x.q")


@given(SIDES, SIDES, st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.01, 2.0]))
def test_every_figure_is_the_dense_one(d_out, d_in, r, seed, s):
    A, B, W = draw(seed, r, d_in), draw(seed + 1, d_out, r), draw(seed + 2, d_out, d_in)
    found = of(factored(Factors(A, B, s))[0], W)
    dense, k = s * B.double() @ A.double(), min(r, d_out, d_in)
    U, _, Vh = torch.linalg.svd(dense)
    assert found.rank == k
    assert found.norm == pytest.approx(dense.norm().item())
    assert found.weight == pytest.approx(W.norm().item())
    assert found.along_update == pytest.approx((U[:, :k].T @ W.double() @ Vh[:k].T).norm().item(), rel=1e-6)
    assert found.along_weight == pytest.approx(torch.linalg.svdvals(W)[:k].norm().item(), rel=1e-4)
    assert found.factors["factor"] == pytest.approx(found.norm / found.along_update)


@pytest.mark.parametrize("c", [0.5, 7.0])
def test_of_c_times_the_strongest_part_of_W_it_is_c(c):
    W = draw(0, 20, 30)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    found = of(factored(Factors(Vh[:4], U[:, :4] * S[:4], c))[0], W)
    assert found.factors["factor"] == pytest.approx(c, rel=1e-9)
    assert found.factors["factor_weight"] == pytest.approx(c, rel=1e-4)


def test_where_W_does_nothing_it_is_infinite():
    W = torch.zeros(6, 7)
    W[:3, :4] = draw(0, 3, 4)
    A, B = torch.zeros(2, 7), torch.zeros(6, 2)
    A[:, 4:], B[3:] = draw(1, 2, 3), draw(2, 3, 2)
    found = of(factored(Factors(A, B, 1.0))[0], W)
    assert found.factors["factor"] == math.inf
    turn = [torch.linalg.qr(draw(i, n, n).double()).Q for i, n in ((3, 6), (4, 7))]  # the zeros are rounded now
    turned = of(factored(Factors(A.double() @ turn[1].T, turn[0] @ B.double(), 1.0))[0], turn[0] @ W.double() @ turn[1].T)
    assert turned.factors["factor"] == math.inf
    assert (found.as_dict()["factor"], found.as_dict()["along_update"]) == (None, 0.0)
    json.dumps(found.as_dict(), allow_nan=False)


def test_turning_both_together_changes_nothing():
    A, B, W = draw(0, 3, 9).double(), draw(1, 8, 3).double(), draw(2, 8, 9).double()
    left, right = torch.linalg.qr(draw(3, 8, 8).double()).Q, torch.linalg.qr(draw(4, 9, 9).double()).Q
    found = [of(factored(f)[0], M) for f, M in ((Factors(A, B, 1.0), W), (Factors(A @ right, left @ B, 1.0), left @ W @ right))]
    assert found[0].factors == pytest.approx(found[1].factors, rel=1e-5)


def test_the_random_control_is_the_mean_of_many_draws():
    W = draw(0, 30, 20)
    found = of(factored(Factors(draw(1, 3, 20), draw(2, 30, 3), 1.0))[0], W)
    squares = []
    for i in range(400):
        U, V = torch.linalg.qr(draw(10 + i, 30, 3)).Q, torch.linalg.qr(draw(1000 + i, 20, 3)).Q
        squares.append((U.T @ W @ V).square().sum().item())
    assert found.along_random == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=0.05)


def test_an_update_of_zero_has_no_factor():
    found = of(factored(Factors(torch.zeros(2, 5), torch.zeros(4, 2), 1.0))[0], draw(0, 4, 5))
    assert (found.rank, found.norm, set(found.factors.values())) == (0, 0.0, {None})


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_the_strongest_singular_values_whatever_the_spectrum(decay):
    """Flat ones, as of a random matrix, are the hard case."""
    U, V = torch.linalg.qr(draw(0, 300, 200)).Q, torch.linalg.qr(draw(1, 250, 200)).Q
    S = torch.arange(1, 201) ** -decay
    values = strongest(U * S @ V.T, 8)
    assert values.norm().item() == pytest.approx(S[:8].norm().item(), rel=1e-4)
    W = draw(2, 300, 250)
    assert strongest(W, 8).norm().item() == pytest.approx(torch.linalg.svdvals(W)[:8].norm().item(), rel=2e-3)


# ------------------------------------------------------------------------------------------------------------------ real adapters
def check(adapter, model, W_of):
    found = amplifications(adapter, model)
    assert [s.name for s in found.sites] == [s.name for s in adapter.sites]
    for s, (name, delta) in zip(found.sites, adapter.deltas().items(), strict=True):
        U, _, Vh = torch.linalg.svd(delta.weight().double())
        along = (U[:, : s.rank].T @ W_of(name).double() @ Vh[: s.rank].T).norm().item()
        assert s.along_update == pytest.approx(along, rel=1e-4)
        assert s.weight == pytest.approx(W_of(name).norm().item(), rel=1e-5)


def test_on_parts_of_a_fused_transposed_weight():
    model = tiny_model("gpt2")
    adapter = shaken(tiny_model("gpt2"), "lora", r=2, sites=["c_attn[v]", "mlp.c_proj"]).state()

    def weight(name):
        W = model.get_submodule(name.split("[")[0]).weight.T
        return W[64:] if "[" in name else W

    check(adapter, model, weight)


def test_on_a_quantized_base():
    model = quantize(tiny_model("llama", hidden_size=64, intermediate_size=64))
    adapter = shaken(tiny_model("llama", hidden_size=64, intermediate_size=64), "lora", r=2, sites=["q_proj"]).state()
    check(adapter, model, lambda name: base_of(model.get_submodule(name)).dense(torch.float32))


def test_of_experts_each():
    model = tiny_model("mixtral")
    adapter = shaken(tiny_model("mixtral"), "lora", r=2, sites=["down_proj"]).state()
    found = amplifications(adapter, model)
    name = adapter.sites[0].name
    assert [s.name for s in found.sites[:4]] == [f"{name}[{e}]" for e in range(4)]
    U, _, Vh = torch.linalg.svd(adapter.deltas()[name].weight()[2].double())
    W = model.get_parameter(name)[2].double()
    assert found.sites[2].along_update == pytest.approx((U[:, :2].T @ W @ Vh[:2].T).norm().item(), rel=1e-4)


def test_some_sites_and_the_table():
    model, adapter = tiny_model("llama"), shaken(tiny_model("llama"), "lora", r=2).state()
    found = amplifications(adapter, model, name="mine", where=["v_proj"])
    assert {s.role for s in found.sites} == {"v"}
    out = Console(file=io.StringIO(), width=160)
    out.print(found.table())
    assert "amplification by mine" in out.file.getvalue()
    with pytest.raises(AdapterMismatch, match="the model has no such weight"):
        amplifications(adapter, tiny_model("gpt2"))
