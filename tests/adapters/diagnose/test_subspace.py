"""φ's laws (LoRA, section 7.2): 1 for the same space in any basis, 0 for orthogonal ones, chance for random ones; found in training too."""

import io
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from lorakit.adapters.diagnose.subspace import SPACES, overlaps, phi
from lorakit.core.errors import AdapterMismatch, BadParameter, NotExportable
from tests.adapters.diagnose.subject import dense, random_adapter, resplit, without_rank
from tests.adapters.subject import shaken, tiny_model


def only(a, b, **kwargs):
    (found,) = overlaps({"a": a, "b": b}, **kwargs).sites
    return found


def grid(a, b, **kwargs):
    return torch.tensor(only(a, b, **kwargs).grid, dtype=torch.float64)


def pair(r_a=2, r_b=3, size=(6, 7), seed=0):
    return random_adapter({"x.q": size}, r=r_a, seed=seed), random_adapter({"x.q": size}, r=r_b, seed=seed + 1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(5, 9), st.integers(5, 9), st.integers(0, 10**6))
def test_every_entry_is_the_definition_on_dense_updates(r_a, r_b, d_out, d_in, seed):
    a, b = pair(r_a, r_b, (d_out, d_in), seed)
    (one,), (other,) = dense(a).values(), dense(b).values()
    sides = {"rows": (one.T, other.T), "columns": (one, other), "A": tuple(x.tensors["x.q.A"].double().T for x in (a, b))}
    sides["B"] = tuple(x.tensors["x.q.B"].double() for x in (a, b))
    for space, (M, N) in sides.items():
        U, V = (torch.linalg.svd(X).U for X in (M, N))
        expected = [[((U[:, :i].T @ V[:, :j]).square().sum() / min(i, j)).item() for j in range(1, r_b + 1)] for i in range(1, r_a + 1)]
        torch.testing.assert_close(grid(a, b, space=space), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
        assert (grid(a, b, space=space) <= 1).all()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_symmetric_and_numerators_never_fall(r_a, r_b, seed):
    a, b = pair(r_a, r_b, seed=seed)
    found = grid(a, b)
    torch.testing.assert_close(found, grid(b, a).T)
    i, j = torch.arange(1, r_a + 1)[:, None], torch.arange(1, r_b + 1)
    shared = found * torch.minimum(i, j)
    assert (shared.diff(dim=0) >= -1e-9).all()
    assert (shared.diff(dim=1) >= -1e-9).all()


@pytest.mark.parametrize("space", SPACES)
def test_the_same_space_in_another_basis_is_1(space):
    a, _ = pair(3)
    assert grid(a, resplit(a), space=space)[-1, -1] == pytest.approx(1)
    if space in ("rows", "columns"):  # there all of φ is a function of ΔW
        torch.testing.assert_close(grid(a, resplit(a), space=space), grid(a, a, space=space), atol=1e-4, rtol=0)


def test_of_A_alone_the_basis_matters_below_the_full_rank():
    a, _ = pair(3)
    assert grid(a, resplit(a), space="A")[0, 0] < 0.99


def test_orthogonal_spaces_are_0():
    a, b = pair(2, 2, (6, 8))
    a.tensors["x.q.A"][:, :4] = 0
    b.tensors["x.q.A"][:, 4:] = 0
    assert grid(a, b).max() < 1e-12
    a.tensors["x.q.B"][:3] = 0
    b.tensors["x.q.B"][3:] = 0
    assert grid(a, b, space="columns").max() < 1e-12


def test_the_row_space_of_B_A_is_not_that_of_A_where_B_has_less_rank():
    a, b = pair(2, 2)
    b = replace(b, tensors={**b.tensors, "x.q.A": a.tensors["x.q.A"]})
    for adapter, kept in ((a, 0), (b, 1)):
        adapter.tensors["x.q.B"][:, 1 - kept] = 0
    assert grid(a, b, space="A")[-1, -1] == pytest.approx(1)
    one, other = a.tensors["x.q.A"].double()
    expected = torch.cosine_similarity(one, other, dim=0).square().item()
    assert only(a, b).ranks == (1, 1)
    assert grid(a, b).item() == pytest.approx(expected)


def test_at_random_it_is_chance():
    draws = [torch.linalg.qr(torch.randn(512, 72, dtype=torch.float64)).Q for _ in range(2)]
    assert phi(draws[0][:, :8], draws[1][:, :64])[-1, -1] == pytest.approx(64 / 512, rel=0.15)
    found = [grid(*pair(2, 4, (40, 60), seed=2 * i))[-1, -1].item() for i in range(60)]
    a, b = pair(2, 4, (40, 60))
    assert only(a, b).chance == 4 / 60
    assert sum(found) / len(found) == pytest.approx(4 / 60, rel=0.15)


def trained(r: int, seed: int, target: Tensor, noise: float) -> dict[str, Tensor]:
    """A low-rank pair fitted to y = target · x + noise from its usual start, B = 0."""
    rng = torch.Generator().manual_seed(seed)
    d_out, d_in = target.shape
    A = (torch.rand(r, d_in, generator=rng) * 2 - 1).div_(d_in**0.5).requires_grad_()
    B = torch.zeros(d_out, r, requires_grad=True)
    optimizer = torch.optim.Adam([A, B], lr=1e-2)
    for _ in range(300):
        x = torch.randn(256, d_in, generator=rng)
        y = x @ target.T + noise * torch.randn(256, d_out, generator=rng)
        loss = (x @ A.T @ B.T - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"x.q.A": A.detach(), "x.q.B": B.detach()}


def test_a_planted_direction_is_found_by_both_ranks_and_the_rest_is_chance():
    rng = torch.Generator().manual_seed(0)
    target = torch.outer(torch.randn(64, generator=rng), torch.randn(256, generator=rng)) / 16
    few, one, other = (
        replace(random_adapter({"x.q": (64, 256)}, r=r), tensors=trained(r, seed, target, 0.3)) for r, seed in ((2, 1), (8, 2), (8, 3))
    )
    for a, b in ((few, one), (one, other)):
        assert grid(a, b)[0, 0] > 0.99
    found = only(one, other)
    assert found.ranks == (8, 8)
    shared = (8 * found.grid[-1][-1] - 1) / 7  # of the directions beside the planted one
    assert shared < 3 * found.chance


def test_every_weight_that_both_change():
    a, b = (shaken(tiny_model("llama"), "lora", seed=s, r=r, sites=where).state() for s, r, where in ((1, 2, "qv"), (2, 3, "attention")))
    found = overlaps({"a": a, "b": b})
    assert [s.name for s in found.sites] == [s.name for s in a.sites]
    assert {s.ranks for s in found.sites} == {(2, 3)}
    assert {s.d for s in found.sites} == {32}
    assert {s.chance for s in found.sites} == {3 / 32}
    assert [s.role for s in overlaps({"a": a, "b": b}, where=["v_proj"]).sites] == ["v", "v"]
    first = "model.layers.0.self_attn.k_proj"
    assert found.notes == [f"4 weights only in b are left out ({first}, …)"]
    assert overlaps({"b": b, "a": a}).notes == found.notes
    assert overlaps({"a": a, "b": b}, where=["v_proj"]).notes == []
    out = Console(file=io.StringIO(), width=140)
    out.print(found.table())
    assert "2×3" in out.file.getvalue()
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["sites"][0]["ranks"] == [2, 3]


def test_of_experts_each():
    a, b = (shaken(tiny_model("mixtral"), "lora", seed=s, r=2, sites=["down_proj"]).state() for s in (1, 2))
    found = overlaps({"a": a, "b": b}).sites
    assert [s.name for s in found[:4]] == [f"{a.sites[0].name}[{e}]" for e in range(4)]
    one, other = (x.deltas()[a.sites[0].name].weight()[3].double() for x in (a, b))
    U, V = (torch.linalg.svd(W.T).U[:, :2] for W in (one, other))
    assert found[3].grid[1][1] == pytest.approx((U.T @ V).square().sum().item() / 2, abs=1e-5)


def test_an_update_of_zero_has_no_directions():
    a, b = pair()
    zero = replace(b, tensors={k: torch.zeros_like(t) for k, t in b.tensors.items()})
    found = only(a, zero)
    assert (found.grid, found.ranks, found.chance) == ([], (2, 0), None)
    out = Console(file=io.StringIO(), width=140)
    out.print(overlaps({"z": zero, "a": a}).table())
    (row,) = [line for line in out.file.getvalue().splitlines() if "x.q" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")][2:] == ["0×2", "-", "-", "-"]
    assert overlaps({"a": a, "b": a}).table().row_count == 1


@pytest.mark.parametrize("space", SPACES)
def test_of_no_rank_there_are_no_directions_either(space):
    a = random_adapter({"x.q": (6, 7), "x.v": (5, 7)}, method="eva", r=3)
    b = without_rank(a, "x.q")
    assert [s.ranks for s in overlaps({"a": a, "b": b}, space=space).sites] == [(3, 0), (3, 3)]


def test_bad_input():
    a, b = pair()
    with pytest.raises(BadParameter, match=r"there is no space 'row'. Did you mean 'rows'\?"):
        overlaps({"a": a, "b": b}, space="row")
    with pytest.raises(BadParameter, match="of two adapters; given: 3"):
        overlaps({"a": a, "b": b, "c": b})
    with pytest.raises(AdapterMismatch, match="no weight in common"):
        overlaps({"a": a, "b": random_adapter({"y": (6, 7)})})
    whole = shaken(tiny_model("llama"), "fourierft", sites=["q_proj"]).state()
    with pytest.raises(NotExportable, match="has no A and no B; compare the rows"):
        overlaps({"a": whole, "b": whole}, space="A")
