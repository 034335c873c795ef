"""The Kronecker product that is never formed, and the rule that all modules share."""

import copy

import pytest
import torch
from torch import Tensor

from lorakit import BadParameter, Site
from lorakit.core import random
from lorakit.core.scale import Rank
from lorakit.parts.deltas.bottleneck import Form
from lorakit.parts.deltas.hypercomplex import HypercomplexSpec, phm
from tests.methods.tools import normal

SITE = Site("layers.0.mlp.down", "linear", 24, 12, 0, "down")


def dense(R: Tensor, S: Tensor, T: Tensor) -> Tensor:
    """Σ_i R_i ⊗ (S_i T_i) by torch's own kron."""
    return sum(torch.kron(R[i], S[i] @ T[i]) for i in range(len(R)))


@pytest.mark.parametrize(("n", "p", "q", "rho"), [(4, 3, 2, 1), (2, 6, 4, 3), (1, 5, 7, 2), (3, 1, 1, 1)])
def test_phm_is_the_dense_kronecker_sum(n, p, q, rho):
    R, S, T = normal(n, n, n, seed=1), normal(n, p, rho, seed=2), normal(n, rho, q, seed=3)
    x = normal(2, 5, n * p, seed=4)
    torch.testing.assert_close(phm(x, R, S, T), x @ dense(R, S, T))


@pytest.mark.parametrize("mutant", [lambda R, S, T: (R.mT, S, T), lambda R, S, T: (R.flip(0), S, T), lambda R, S, T: (R, S.flip(1), T)])
def test_a_wrong_order_is_seen(mutant):
    parts = normal(4, 4, 4, seed=1), normal(4, 3, 1, seed=2), normal(4, 1, 2, seed=3)
    x = normal(5, 12, seed=4)
    assert (phm(x, *mutant(*parts)) - x @ dense(*parts)).abs().max() > 0.1


def pair(spec: HypercomplexSpec):
    where = {"dtype": torch.float64, "device": torch.device("cpu")}
    sites = [SITE, Site("layers.1.mlp.down", "linear", 24, 12, 1, "down")]
    pool = spec.pool(sites, every=sites, rng=random.generator(0, "pool"), **where)
    return pool, [spec.build(site, pool=pool, **where) for site in sites]


def test_every_module_holds_the_one_rule_and_registers_it_nowhere():
    pool, deltas = pair(HypercomplexSpec(Form(Rank.of(4, 1.0, rule="constant"))))
    assert all(d.rule[0].R.data_ptr() == pool.R.data_ptr() for d in deltas)
    assert not any("R" in name for d in deltas for name in d.state_dict())
    copied, twins = copy.deepcopy((pool, deltas))
    assert all(d.rule[0] is copied for d in twins)
    assert copied.R.data_ptr() != pool.R.data_ptr()


def test_counts():
    for n, rho, r in ((4, 1, 4), (2, 3, 6)):
        spec = HypercomplexSpec(Form(Rank.of(r, 1.0, rule="constant")), n, rho)
        pool, deltas = pair(spec)
        projections = 2 * rho * (12 + r) + r + 12  # ρ (in + out) + out for each of the two
        assert spec.count(SITE) == projections == sum(p.numel() for p in deltas[0].parameters())
        assert spec.count_shared([SITE]) == n**3 == sum(p.numel() for p in pool.parameters())


def test_n_must_divide():
    spec = HypercomplexSpec(Form(Rank.of(6, 1.0, rule="constant")), n=4)
    with pytest.raises(BadParameter, match="n=4 does not divide r=6 at site 'layers.0.mlp.down'"):
        spec.check([SITE])
    spec = HypercomplexSpec(Form(Rank.of(5, 1.0, rule="constant")), n=5)
    with pytest.raises(BadParameter, match="n=5 does not divide the width 12"):
        spec.check([SITE])
