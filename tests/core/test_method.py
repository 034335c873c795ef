"""Methods as values, the registry, and parameters as the user types them."""

import dataclasses
from typing import Any

import pytest

from lorakit import BadParameter, Incompatible, Method, NoSuchMethod, NotExportable, attach, describe, get_method, list_methods, method
from lorakit.core import method as registry
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.scale import Rank
from lorakit.methods.learning.dora import DecomposedSpec
from lorakit.methods.lora.lora import lora
from lorakit.methods.rank_allocation.adalora import Orthogonal
from lorakit.parts.inits.random import Gaussian
from tests.laws.subject import base


def test_the_methods_of_this_version() -> None:
    assert set(list_methods()) >= {"adalora", "dora", "init_ab", "lora", "lora_fa", "loraplus", "pissa", "rslora"}
    assert list_methods() == sorted(list_methods())


@pytest.mark.parametrize("name", list_methods())
def test_a_method_is_a_frozen_value(name: str) -> None:
    one, two = get_method(name), get_method(name)
    assert one == two
    assert hash(one.delta) == hash(two.delta)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.sites = "qv"
    parts = [one.delta, one.init, one.combine, one.optim, one.loop, *one.penalties, *one.controllers, *one.patches]
    assert all(dataclasses.is_dataclass(p) and type(p).__dataclass_params__.frozen for p in parts if p is not None)


def test_one_name_stands_for_a_tuple_of_one() -> None:
    assert get_method("lora", unfreeze="lm_head") == get_method("lora", unfreeze=("lm_head",))


def test_names_and_values_as_typed() -> None:
    with pytest.raises(NoSuchMethod, match="Did you mean 'lora'"):
        get_method("lorra")
    with pytest.raises(BadParameter, match="Did you mean 'alpha'"):
        get_method("lora", alhpa=3)
    for wrong in ({"r": "eight"}, {"r": 8.5}, {"dropout": "no"}, {"unfreeze": 3}, {"rank_pattern": [1]}):
        (key,) = wrong
        with pytest.raises(BadParameter, match=f"{key}="):
            get_method("lora", **wrong)
    with pytest.raises(BadParameter, match="0 <= dropout < 1"):
        get_method("lora", dropout=1.0)
    for wrong in ({"init": "C"}, {"init": "a"}):
        with pytest.raises(BadParameter):
            get_method("init_ab", **wrong)
    assert get_method("lora", r="8", alpha=16).delta == get_method("lora").delta


def test_recipes_rebuild_their_method() -> None:
    for name in list_methods():
        made = get_method(name, **({"sites": "qv"} if "sites" in describe(name).parameters else {}))
        assert made.recipe is not None
        assert get_method(made.recipe.name, **made.recipe.kwargs) == made


def test_but_checks_again_and_has_no_recipe() -> None:
    made = get_method("lora").but(combine=DecomposedSpec())
    assert made == get_method("dora")
    assert made.recipe is None
    with pytest.raises(NotExportable, match="no recipe"):
        attach(base(), made).state()
    with pytest.raises(BadParameter, match="Did you mean 'combine'"):
        made.but(combin=None)
    with pytest.raises(BadParameter):
        made.but(recipe=None)


def test_parts_that_cannot_work_together_are_refused_when_built() -> None:
    plain, gated = LowRankSpec(Rank.of(4, 4)), LowRankSpec(Rank.of(4, 4), gate=True, train=("A", "B", "g"))
    for parts in ({"init": Gaussian()}, {"init": get_method("pissa").init}, {"controllers": get_method("adalora").controllers}):
        with pytest.raises(Incompatible, match="needs a delta with"):
            Method(plain, **parts)
    assert Method(gated, Gaussian(), penalties=(Orthogonal(0.1),))
    with pytest.raises(Incompatible, match="DecomposedSpec"):
        Method(None, combine=DecomposedSpec())


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @method("mine", paper="arXiv:0000.00000", survey="0", kind="delta")
    def mine(r: int = 3) -> Method:
        """Mine."""
        return lora(r)

    assert get_method("mine", r=5).recipe == registry.Recipe("mine", {"r": 5})
    assert describe("mine").as_dict()["parameters"] == {"r": 3}
    assert describe("mine").summary == "Mine."
    mine.__module__ = "somewhere.else"
    with pytest.raises(BadParameter, match="registered twice"):
        method("mine", paper="", survey="", kind="")(lambda r=1: lora(r))


def test_a_method_without_deltas_only_unfreezes() -> None:
    made = Method(None, unfreeze=("norm",), sites="nothing at all")
    adapted = attach(base(), made)
    assert adapted.branches() == []
    assert {p.role for p in adapted.params()} == {"full"}
    assert made.count([]) == 0


def test_predicates_are_sites_too() -> None:
    chosen: Any = lambda s: s.role == "q"  # noqa: E731
    adapted = attach(base(), get_method("lora", sites=chosen))
    assert {b.site.role for b in adapted.branches()} == {"q"}


def test_an_integer_that_no_tensor_could_have_is_refused():
    with pytest.raises(BadParameter, match="r=4294967297 is too large; expected at most 4294967296"):
        get_method("vera", r=2**32 + 1)
