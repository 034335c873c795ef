"""What holds for every mixer, in every space that is a function of ΔW."""

import pytest
import torch

from lorakit.adapters.mix import MIXERS, mix
from lorakit.adapters.mix.keep import everything
from lorakit.adapters.mix.merge import total
from lorakit.core.errors import Incompatible
from tests.adapters.mix.values import adapter, close, dense, pair, stats_for, turned, weight

SPACES = ("delta", "core", "knots")
WHOLE = {"density": 1.0, "scale": 1.0}
"""Options under which nothing is dropped or shrunk."""
LINEAR = [name for name, m in MIXERS.items() if m.rule().keep is everything and m.rule().merge is total]
CASES = [(name, space) for name in MIXERS for space in SPACES if not (name == "fisher" and space != "delta")]


def options(name: str, **wanted: float) -> dict[str, float]:
    return {key: value for key, value in wanted.items() if key in MIXERS[name].options}


@pytest.mark.parametrize(("name", "space"), CASES)
def test_one_adapter_with_weight_1_comes_out_as_it_went_in(name: str, space: str) -> None:
    f = pair(1)
    mixed = mix([adapter(f)], name, weights=[1.0], space=space, stats=stats_for(name, [f]), **options(name, **WHOLE))
    assert close(weight(mixed), dense(f), 5e-6)
    assert mixed.meta["mix"]["lost"]["total"] < 1e-6


@pytest.mark.parametrize(("name", "space"), CASES)
def test_several_of_the_same_are_that_one(name: str, space: str) -> None:
    """Where weights make a mean: all of them are 1, or 1/N."""
    f = pair(1)
    weights = None if name != "task_arithmetic" else [0.5, 0.5]
    many = [adapter(f), adapter(turned(f))]
    mixed = mix(many, name, weights=weights, space=space, stats=stats_for(name, [f, f]), **options(name, **WHOLE))
    assert close(weight(mixed), dense(f), 1e-5)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", [name for name in LINEAR if name not in ("average", "slerp", "regmean")])
def test_plus_and_minus_the_same_is_nothing(name: str, space: str) -> None:
    f = pair(2)
    mixed = mix([adapter(f), adapter(turned(f))], name, weights=[1.0, -1.0], space=space)
    assert float(weight(mixed).norm()) < 1e-5 * float(dense(f).norm())


@pytest.mark.parametrize(("name", "space"), CASES)
def test_only_the_update_counts_not_how_it_is_factored(name: str, space: str) -> None:
    some = [pair(1, 2), pair(2, 3)]
    given = {"weights": [0.7, 0.3], "space": space, "stats": stats_for(name, some), "seed": 4} | options(name, density=0.6)
    one = mix([adapter(f) for f in some], name, **given)
    other = mix([adapter(turned(f)) for f in some], name, **given)
    assert close(weight(other), weight(one), 2e-5)


@pytest.mark.parametrize(("name", "space"), CASES)
def test_the_same_seed_makes_the_same_bits_and_nobody_elses_numbers_are_drawn(name: str, space: str) -> None:
    some = [pair(1), pair(2)]
    given = {"space": space, "stats": stats_for(name, some), "seed": 3}
    state = torch.get_rng_state()
    one, other = (mix([adapter(f) for f in some], name, **given) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)


@pytest.mark.parametrize("name", MIXERS)
def test_a_missing_site_is_zero(name: str) -> None:
    one, other = adapter(pair(1), pair(2)), adapter(pair(3))
    zero = adapter(pair(3), pair(2)._replace(B=torch.zeros(12, 3)))
    stats = [{**s, "layers.1.q_proj": s["layers.0.q_proj"]} for s in stats_for(name, [pair(1), pair(3)]) or []] or None
    if name in ("regmean", "fisher"):  # there what is missing says nothing, and what is zero says zero
        assert close(weight(mix([one, other], name, stats=stats), 1), dense(pair(2)), 1e-5)
        return
    given = {"weights": [0.6, 0.4], "seed": 1, "stats": stats, "space": "delta+svd:10"} | options(name, density=0.7)
    assert close(weight(mix([one, other], name, **given), 1), weight(mix([one, zero], name, **given), 1), 1e-4)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_sums_are_exact_in_every_space(name: str, space: str) -> None:
    some = [pair(1, 2, s=0.5), pair(2, 4, s=3.0), pair(3, 1)]
    mixed = mix([adapter(f) for f in some], name, weights=[0.7, -0.2, 1.5], space=space, **options(name, scale=1.0))
    assert close(weight(mixed), sum(w * dense(f) for w, f in zip([0.7, -0.2, 1.5], some, strict=True)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in LINEAR and name != "fisher"])
def test_aligned_spaces_keep_the_rank_and_delta_does_not(name: str) -> None:
    some = [pair(i, 1, d_out=40, d_in=30) for i in range(2)]
    many = [adapter(f) for f in some]
    for space in ("core", "knots"):
        mixed = mix(many, name, weights=[1.0, 0.5], space=space, **options(name, density=0.5))
        assert torch.linalg.matrix_rank(weight(mixed), rtol=1e-5) <= 2
        assert mixed.meta["mix"]["lost"]["total"] == 0
    whole = mix(many, name, weights=[1.0, 0.5], space="delta+svd:30", **options(name, density=0.5))
    assert torch.linalg.matrix_rank(weight(whole), rtol=1e-5) > 10
    assert mix(many, name, weights=[1.0, 0.5], **options(name, density=0.5)).meta["mix"]["lost"]["total"] > 0.05


@pytest.mark.parametrize("name", ["ties", "linear", "dare_linear"])
def test_factor_space_needs_equal_ranks(name: str) -> None:
    with pytest.raises(Incompatible, match=r"ranks \[2, 3\] do not allow; use space='delta'"):
        mix([adapter(pair(1, 2)), adapter(pair(2, 3))], name, space="factor")


@pytest.mark.parametrize("space", ["core", "knots", "factor"])
def test_fisher_knows_the_entries_of_the_weight_alone(space: str) -> None:
    some = [pair(1), pair(2)]
    with pytest.raises(Incompatible, match="fisher works in space='delta' alone"):
        mix([adapter(f) for f in some], "fisher", space=space, stats=stats_for("fisher", some))
