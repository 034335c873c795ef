"""Each mixer against its definition on whole matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.adapters.mix import mix
from lorakit.core.errors import BadParameter
from tests.adapters.mix.values import adapter, close, dense, pair, stats_for, turned, weight

SMALL = {"d_out": 6, "d_in": 5}
"""Two updates of rank 3 fill such a matrix, so that nothing is cut off."""


def fp32(f) -> Tensor:
    """ΔW as it is made block by block."""
    return f.B @ f.A * f.s


def trimmed(W: Tensor, density: float) -> Tensor:
    """The k largest entries, the first of equal ones."""
    k = int(density * W.numel() + 1e-9)
    order = sorted(range(W.numel()), key=lambda i: (-abs(float(W.flatten()[i])), i))
    kept = torch.zeros(W.numel(), dtype=torch.bool)
    kept[order[:k]] = True
    return torch.where(kept.view_as(W), W, 0)


def ties(values: list[Tensor], weights: list[float], vote: str) -> Tensor:
    """Entry by entry, as it is written down."""
    out = torch.zeros_like(values[0])
    for at in range(out.numel()):
        weighted = [w * float(v.flatten()[at]) for w, v in zip(weights, values, strict=True)]
        ballot = sum(weighted) if vote == "total" else sum((x > 0) - (x < 0) for x in weighted)
        sign = 1 if ballot >= 0 else -1
        agree = [(x, abs(w)) for x, w in zip(weighted, weights, strict=True) if x * sign > 0]
        out.view(-1)[at] = sum(x for x, _ in agree) / sum(w for _, w in agree) if agree else 0.0
    return out


@settings(max_examples=60)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True),
    density=st.sampled_from([0.1, 0.2, 0.37, 0.5, 0.9, 1.0]),
    weights=st.lists(st.sampled_from([1.0, 0.5, 2.0, -1.0, -0.3]), min_size=4, max_size=4),
    vote=st.sampled_from(["total", "frequency"]),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_ties_is_its_definition(seeds: list[int], density: float, weights: list[float], vote: str, scale: float) -> None:
    some, weights = [pair(s, 3, **SMALL) for s in seeds], weights[: len(seeds)]
    mixed = mix([adapter(f) for f in some], "ties", weights=weights, density=density, vote=vote, scale=scale)
    wanted = scale * ties([trimmed(fp32(f), density) for f in some], weights, vote)
    assert close(weight(mixed), wanted.double(), 1e-5)


def test_ties_by_hand() -> None:
    """Two of three agree on −; the third's larger +3 wins the vote of sums and loses that of heads."""
    values = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-1.0, -4.0]]), torch.tensor([[3.0, 0.0]])]
    eye = torch.eye(1)
    some = [adapter(pair(1)._replace(A=v, B=eye, s=1.0)) for v in values]
    assert weight(mix(some, "ties", density=1.0)).flatten().tolist() == pytest.approx([3.0, -4.0])
    assert weight(mix(some, "ties", density=1.0, vote="frequency")).flatten().tolist() == pytest.approx([-1.0, 2.0])


@pytest.mark.parametrize("density", [0.1, 0.33, 0.5, 1.0])
def test_magnitude_prune_keeps_just_so_many(density: float) -> None:
    some = [pair(i, 3, **SMALL) for i in (1, 2)]
    mixed = mix([adapter(f) for f in some], "magnitude_prune", weights=[0.7, 0.3], density=density)
    wanted = 0.7 * trimmed(fp32(some[0]), density) + 0.3 * trimmed(fp32(some[1]), density)
    assert close(weight(mixed), wanted.double(), 1e-5)


@pytest.mark.parametrize("block", [1, 2**19])
def test_equal_entries_are_kept_from_the_first_on(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.adapters.mix.keep.BLOCK", block)
    ones = pair(1)._replace(A=torch.ones(1, 4), B=torch.ones(3, 1), s=1.0)
    kept = weight(mix([adapter(ones)], "magnitude_prune", weights=[1.0], density=5 / 12, space="delta+svd:3"))
    assert kept.round().flatten().tolist() == [1] * 5 + [0] * 7


def test_blocks_of_any_size_keep_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [adapter(pair(i, 3, **SMALL)) for i in (1, 2)]
    whole = mix(some, "ties", density=0.4)
    monkeypatch.setattr("lorakit.adapters.mix.keep.BLOCK", 7)  # a row at a time
    assert close(weight(mix(some, "ties", density=0.4)), weight(whole), 1e-6)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_what_chance_drops_leaves_the_expectation(name: str) -> None:
    f = pair(1, 3, **SMALL)
    n = 400
    given = {"weights": [1.0], "density": 0.5, "space": "delta+svd:5"}
    draws = torch.stack([weight(mix([adapter(f)], name, seed=seed, **given)) for seed in range(n)])
    W = dense(f)
    assert ((draws.mean(0) - W).abs() <= 6 * W.abs() / math.sqrt(n) + 1e-6).all()
    assert not close(draws[0], draws[1], 0.1)


def test_dare_keeps_a_share_and_scales_it() -> None:
    f = pair(1, 4, d_out=64, d_in=64)
    kept = weight(mix([adapter(f)], "dare_linear", weights=[1.0], density=0.3, space="delta+svd:64"))
    W = dense(f)
    seen = W.abs() > 0.1  # of the others rounding hides whether they are there
    there = seen & (kept.abs() > 0.5 * W.abs())
    assert abs(there.sum() / seen.sum() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / int(seen.sum()))
    assert torch.allclose(kept[there], W[there] / 0.3, rtol=1e-2)


def test_della_drops_small_entries_sooner() -> None:
    f = pair(1, 4, d_out=64, d_in=64)
    W = dense(f)
    kept = torch.stack(
        [weight(mix([adapter(f)], "della_linear", weights=[1.0], density=0.5, epsilon=0.5, seed=s, space="delta+svd:64")) for s in range(6)]
    )
    there = (kept.abs() > 1e-4 * W.abs()).double().mean(0)
    small = W.abs() < W.abs().median(1, keepdim=True).values
    assert there[small].mean() == pytest.approx(0.375, abs=0.03)
    assert there[~small].mean() == pytest.approx(0.625, abs=0.03)
    for group in (small & (W.abs() > 0.1), ~small):  # and each as many times larger as it is unlikely
        assert (kept[:, group].sum(0) / W[group]).mean() / 6 == pytest.approx(1.0, abs=0.06)


def test_adapters_drop_different_entries() -> None:
    f = pair(1, 3, **SMALL)
    one = mix([adapter(f), adapter(f)], "dare_linear", weights=[1.0, 0.0], density=0.5)
    other = mix([adapter(f), adapter(f)], "dare_linear", weights=[0.0, 1.0], density=0.5)
    assert not close(weight(one), weight(other), 0.1)


def test_average_divides_by_the_weights() -> None:
    some = [pair(1), pair(2)]
    mixed = mix([adapter(f) for f in some], "average", weights=[2.0, 6.0])
    assert close(weight(mixed), 0.25 * dense(some[0]) + 0.75 * dense(some[1]))
    with pytest.raises(BadParameter, match="sum up to 0, and an average divides by it; how='linear'"):
        mix([adapter(f) for f in some], "average", weights=[1.0, -1.0])


def test_an_average_of_orthogonal_updates_keeps_all_their_directions_and_factor_space_does_not() -> None:
    """lora_average: every σ is 1/N of itself; averaged apart, own terms are 1/N² and the rest are cross terms of rank r."""
    U, V = (torch.linalg.qr(torch.randn(d, 6, generator=torch.Generator().manual_seed(d))).Q for d in (12, 10))
    parts = [
        pair(i)._replace(A=V[:, 3 * i : 3 * i + 3].T, B=U[:, 3 * i : 3 * i + 3] * torch.tensor([3.0, 2.0, 1.0]), s=2.0) for i in (0, 1)
    ]
    found = weight(mix([adapter(f) for f in parts], "average"))
    assert torch.allclose(torch.linalg.svdvals(found)[:6], torch.tensor([3.0, 3.0, 2.0, 2.0, 1.0, 1.0], dtype=torch.float64), atol=1e-5)
    apart = weight(mix([adapter(f) for f in parts], space="factor:both"))
    assert torch.linalg.matrix_rank(apart, tol=1e-5) == 3
    own = torch.stack([U[:, i].double() @ apart @ V[:, i].double() for i in range(6)])
    assert torch.allclose(own, torch.tensor([1.5, 1.0, 0.5] * 2, dtype=torch.float64), atol=1e-5)


def test_slerp_goes_along_the_arc() -> None:
    one, other = pair(1), pair(2)
    one, other = (f._replace(s=f.s / float(dense(f).norm())) for f in (one, other))
    at = [weight(mix([adapter(one), adapter(other)], "slerp", weights=[1 - t, t])) for t in (0.0, 0.25, 0.5, 1.0)]
    assert all(float(W.norm()) == pytest.approx(1.0, abs=1e-6) for W in at)
    assert close(at[0], dense(one)) and close(at[3], dense(other))
    angle = math.acos(float((at[0] * at[3]).sum()))
    assert math.acos(float((at[0] * at[1]).sum())) == pytest.approx(angle / 4, abs=1e-6)
    with pytest.raises(BadParameter, match="slerp goes from one adapter to another; 3 were given"):
        mix([adapter(pair(i)) for i in range(3)], "slerp")


def test_regmean_is_the_least_squares_solution() -> None:
    some, rng = [pair(1, 2), pair(2, 3)], torch.Generator().manual_seed(0)
    X = [torch.randn(50, 10, generator=rng, dtype=torch.float64) for _ in some]
    stats = [{"layers.0.q_proj": x.T @ x} for x in X]
    mixed = mix([adapter(f) for f in some], "regmean", stats=stats, off_diagonal=1.0, ridge=0.0)
    targets = torch.cat([x @ dense(f).T for x, f in zip(X, some, strict=True)])
    wanted = torch.linalg.lstsq(torch.cat(X), targets).solution.T
    assert close(weight(mixed), wanted, 1e-6)
    assert torch.linalg.matrix_rank(weight(mixed), rtol=1e-6) <= 5


def test_regmean_with_equal_inputs_is_the_average() -> None:
    some = [pair(1), pair(2)]
    eye = [{"layers.0.q_proj": torch.eye(10)}] * 2
    assert close(weight(mix([adapter(f) for f in some], "regmean", stats=eye)), (dense(some[0]) + dense(some[1])) / 2, 1e-5)


def test_regmean_without_the_off_diagonal_weighs_columns() -> None:
    some = [pair(1), pair(2)]
    stats = stats_for("regmean", some)
    assert stats is not None
    D = [s["layers.0.q_proj"].diagonal().double() for s in stats]
    mixed = mix([adapter(f) for f in some], "regmean", stats=stats, off_diagonal=0.0, ridge=0.0)
    assert close(weight(mixed), (dense(some[0]) * D[0] + dense(some[1]) * D[1]) / (D[0] + D[1]), 1e-5)


def test_fisher_weighs_entries() -> None:
    some = [pair(1, 3, **SMALL), pair(2, 3, **SMALL)]
    stats = stats_for("fisher", some)
    assert stats is not None
    F = [s["layers.0.q_proj"].double() for s in stats]
    mixed = mix([adapter(f) for f in some], "fisher", weights=[1.0, 3.0], stats=stats)
    F = [one + 1e-6 * (F[0].mean() + F[1].mean()) / 2 for one in F]
    wanted = (F[0] * dense(some[0]) + 3 * F[1] * dense(some[1])) / (F[0] + 3 * F[1])
    assert close(weight(mixed), wanted, 1e-5)


def test_statistics_that_are_missing_are_asked_for() -> None:
    some = [adapter(pair(1)), adapter(pair(2))]
    with pytest.raises(BadParameter, match=r"needs a gram of every adapter's task: stats holds 0 of 2"):
        mix(some, "regmean")
    with pytest.raises(BadParameter, match=r"gram of shape \(10, 10\) of adapter 2's task at layers.0.q_proj; stats has none"):
        mix(some, "regmean", stats=[{"layers.0.q_proj": torch.eye(10)}, {}])


def test_svd_cuts_to_a_rank_and_says_what_is_lost() -> None:
    some = [pair(1, 3), pair(2, 3)]
    values = torch.linalg.svdvals(sum(dense(f) for f in some) / 2)  # type: ignore[call-overload]
    mixed = mix([adapter(f) for f in some], "svd", rank=2)
    lost = float(values[2:].norm() / values.norm())
    assert mixed.meta["mix"]["lost"]["total"] == pytest.approx(lost, rel=1e-5)
    assert close(weight(mixed), sum(dense(f) for f in some) / 2, lost * 1.001)  # type: ignore[arg-type]
    assert len(mix([adapter(f) for f in some], "svd").factors()["layers.0.q_proj"].A) == 3, "the largest rank"
    assert close(weight(mix([adapter(f) for f in some], space="delta+svd:2")), weight(mixed), 1e-6), "one and the same"


def test_mixture_less_fusion_in_closed_form() -> None:
    """(s/4)(B₁ − B₂)(A₁ − A₂), LoRARetriever's two forms."""
    one, other = pair(1), pair(2)
    some = [adapter(one), adapter(other)]
    mixture, fusion = mix(some, "linear"), mix(some, "linear", space="factor:both")
    wanted = one.s / 4 * (one.B - other.B).double() @ (one.A - other.A).double()
    assert close(weight(mixture) - weight(fusion), wanted, 1e-5)


def test_a_negative_weight_in_lorahubs_space_is_a_positive_one() -> None:
    f = pair(1)
    assert close(weight(mix([adapter(f)], weights=[-1.0], space="factor:both")), dense(f))
    assert close(weight(mix([adapter(f)], weights=[-1.0])), -dense(f))


def test_factor_space_is_pefts_formula() -> None:
    some, weights = [pair(1, s=2.0), pair(2, s=2.0)], [0.7, -0.3]
    roots = [math.sqrt(abs(w * f.s)) for w, f in zip(weights, some, strict=True)]
    A = sum(math.copysign(c, w) * f.A.double() for c, w, f in zip(roots, weights, some, strict=True))
    B = sum(c * f.B.double() for c, f in zip(roots, some, strict=True))
    assert close(weight(mix([adapter(f) for f in some], weights=weights, space="factor")), B @ A, 1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("space", ["factor", "factor:both", "factor:pem"])
def test_factor_spaces_know_negative_scales(space: str) -> None:
    f = pair(1, s=-2.0)
    assert close(weight(mix([adapter(f)], weights=[1.0], space=space)), dense(f))


def test_pems_addition_negation_and_analogy() -> None:
    """⊖ turns B alone (arXiv:2306.14870); of one start, θ and ⊖θ cancel, and of another split of the same update they do not."""
    task, lm, other = pair(1), pair(2), pair(3)
    negated = mix([adapter(task)], weights=[-1.0], space="factor:pem")
    assert close(weight(negated), -dense(task))
    assert not weight(mix([adapter(task), adapter(task)], weights=[0.5, -0.5], space="factor:pem")).any()
    assert weight(mix([adapter(task), adapter(turned(task))], weights=[0.5, -0.5], space="factor:pem")).norm() > 0.1
    analogy = mix([adapter(f) for f in (task, lm, other)], weights=[0.6, 0.4, -0.4], space="factor:pem")
    A = 0.6 * task.A + 0.4 * lm.A + 0.4 * other.A
    B = 0.6 * task.B + 0.4 * lm.B - 0.4 * other.B
    assert close(weight(analogy), 2.0 * B.double() @ A.double(), 1e-5)


@pytest.mark.parametrize(
    ("how", "kind", "value"), [("regmean", "gram", math.nan), ("fisher", "fisher", math.inf), ("fisher", "fisher", -1.0)]
)
def test_statistics_that_are_none(how: str, kind: str, value: float) -> None:
    some = [pair(1), pair(2)]
    stats = stats_for(how, some)
    assert stats is not None
    stats[1]["layers.0.q_proj"][0, 0] = value
    with pytest.raises(BadParameter, match=f"the {kind} of adapter 2's task at layers.0.q_proj has entries that no {kind} has"):
        mix([adapter(f) for f in some], how, stats=stats)
