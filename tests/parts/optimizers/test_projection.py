"""Random projections: unbiased, replayed from their seed, never exact."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.parts.optimizers import projection
from lorakit.parts.optimizers.projection import Projections, compressed, down, up
from tests.laws.subject import same_bits
from tests.methods.tools import normal


def error(G: Tensor, r: int, draws: int, *, seed: int = 0) -> float:
    """Relative error of the mean of up(down(G)) over so many draws."""
    made = Projections(r, seed, "x")
    total = torch.zeros_like(G)
    for i in range(draws):
        P = made.of(i, G)
        total += up(down(G, P), P, G.shape)
    return float((total / draws - G).norm() / G.norm())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
def test_the_mean_over_draws_is_the_matrix(shape: tuple[int, int]) -> None:
    G = normal(*shape)
    assert down(G, Projections(4, 0, "x").of(0, G)).shape == compressed(G.shape, 4)
    assert error(G, 4, 2000) < 0.08
    falls = error(G, 4, 100) / error(G, 4, 1600)
    assert 2.5 < falls < 6.4, "as 1/√n, by 4"


def test_mutants_are_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    G = normal(12, 30)
    with monkeypatch.context() as m:
        m.setattr(projection.math, "sqrt", lambda x: float(x))  # variance 1/r²
        assert error(G, 4, 2000) > 0.5
    with monkeypatch.context() as m:
        of = Projections.of
        m.setattr(Projections, "of", lambda self, draw, like: of(self, 0, like))  # one draw for ever
        assert error(G, 4, 2000) > 0.5


def test_one_draw_is_never_exact_and_its_error_is_about_the_root_of_d_over_r() -> None:
    G = normal(12, 30)
    for r in (4, 48, 1200):
        mean = sum(error(G, r, 1, seed=s) for s in range(20)) / 20
        assert mean == pytest.approx(math.sqrt(12 / r), rel=0.3)
        assert mean > 0.05


def test_a_draw_is_a_function_of_its_name_seed_number_and_dimension() -> None:
    G = normal(12, 30)
    P = Projections(4, 0, "x").of(3, G)
    torch.manual_seed(5)
    made = Projections(4, 0, "x")
    made.of(9, G), made.of(0, normal(7, 9))
    assert same_bits(made.of(3, G), P)
    assert same_bits(made.of(3, normal(50, 12)), P), "matrices of one smaller dimension share a draw"
    assert same_bits(made.of(3, G.float()), P.float())
    others = [Projections(4, 1, "x").of(3, G), Projections(4, 0, "y").of(3, G), made.of(4, G), made.of(3, normal(13, 30))[:, :12]]
    assert all(not torch.equal(P, Q) for Q in others)


def test_only_the_last_two_draws_are_kept() -> None:
    made = Projections(4, 0, "x")
    for i in range(6):
        for shape in ((12, 30), (20, 30)):
            made.of(i, normal(*shape))
    assert {draw for draw, *_ in made.held} == {4, 5}
