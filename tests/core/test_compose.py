"""Several methods at once: whose parts there are, what cannot be had together, and that such a recipe saves, loads and is listed."""

from pathlib import Path

import pytest

import lorakit
from lorakit import describe, get_method
from lorakit.core.combine import AddSpec
from lorakit.core.errors import BadParameter, Incompatible, NoSuchMethod
from lorakit.train.config import make_config
from tests.adapters.subject import quiet
from tests.laws.subject import attached, awaken, base, batch, far, logits, same_bits


def test_each_brings_its_own_parts() -> None:
    both, pissa, plus = (get_method(name, r=4) for name in ("pissa+loraplus", "pissa", "loraplus"))
    assert (both.delta, both.init) == (pissa.delta, pissa.init)
    assert both.optim == plus.optim
    dora = get_method("dora+rslora", r=4, alpha=8.0)
    assert dora.combine == get_method("dora").combine
    assert dora.delta.rank.rule == "sqrt"  # type: ignore[union-attr]
    assert dora.delta.rank.alpha == 8.0  # type: ignore[union-attr]
    three = get_method("pissa+qlora+loraplus")
    assert three.base == get_method("qlora").base
    assert three.optim == plus.optim
    assert get_method("adalora+qlora").controllers == get_method("adalora").controllers


def test_the_first_leads() -> None:
    """Ranks, scales and defaults are those of the method named first, and given ones go to all."""
    assert get_method("qlora+dora").delta.rank.r == 64  # type: ignore[union-attr]
    assert get_method("dora+qlora").delta.rank.r == 8  # type: ignore[union-attr]
    assert get_method("dora+qlora", r=5, alpha=3.0).delta.rank == get_method("lora", r=5, alpha=3.0).delta.rank  # type: ignore[union-attr]
    entry = describe("pissa+loraplus")
    assert entry.parameters.keys() == describe("pissa").parameters.keys() | describe("loraplus").parameters.keys()
    assert entry.parameters["alpha"].default == describe("pissa").parameters["alpha"].default
    assert entry.paper == "arXiv:2404.02948, arXiv:2402.12354"


def test_what_any_trains_whole_is_trained_whole() -> None:
    assert get_method("lora+longlora").unfreeze == get_method("longlora").unfreeze != ()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pissa+adalora", "their own start"),
        ("riemannian+loraplus", "their own optim"),
        ("bilora+dfo_lora", "their own loop"),
        ("vera+rslora", "another kind of update"),
        ("increlora+adalora", "each set the gate"),
    ],
)
def test_what_cannot_be_had_at_once_is_refused(name: str, says: str) -> None:
    with pytest.raises(Incompatible, match=says):
        get_method(name)


def test_wrong_names_and_parameters_are_as_of_one_method() -> None:
    with pytest.raises(NoSuchMethod, match="'pissa'"):
        get_method("pisa+loraplus")
    with pytest.raises(BadParameter, match="'ratio'"):
        get_method("pissa+loraplus", ratios=3)
    with pytest.raises(BadParameter, match="rank r=0"):
        get_method("pissa+loraplus", r=0)


def test_the_recipe_saves_loads_and_is_a_configuration(tmp_path: Path) -> None:
    config = make_config({"method": "dora+loraplus", "ratio": 4.0, "r": 4, "train_data": "x"})
    adapted = awaken(attached(base(), config.build_method()))
    want = logits(adapted.model.eval(), batch())
    adapted.save(tmp_path / "a")
    again = lorakit.load(base(), tmp_path / "a")
    assert same_bits(logits(again.model.eval(), batch()), want)
    assert again.methods["default"].recipe.name == "dora+loraplus"  # type: ignore[union-attr]
    assert again.methods["default"].optim == adapted.methods["default"].optim


@pytest.mark.parametrize("name", ["dora+rslora", "pissa+loraplus", "dora+pissa", "adalora+loraplus"])
def test_compositions_go_to_peft_in_the_form_of_the_part_that_decides(name: str, tmp_path: Path) -> None:
    """Equal logits in the real PEFT; DoRA over PiSSA's pair is DoRA there, not PiSSA."""
    from peft import PeftModel

    from lorakit.adapters.peft import to_peft

    adapted = awaken(attached(base(), get_method(name, r=8)))
    want = logits(adapted.model.eval(), batch())
    to_peft(adapted.state(), tmp_path / "p", model=base())
    with quiet():
        theirs = PeftModel.from_pretrained(base(), tmp_path / "p").eval()
    assert far(logits(theirs, batch()), want) < 1e-4
    assert isinstance(adapted.methods["default"].combine, AddSpec) == ("dora" not in name)


def test_a_name_that_only_looks_the_same_stays_apart() -> None:
    """`ratio` is λ in delta_lora and B's rate in loraplus: neither takes the other's default, and none can be given for both."""
    both = get_method("delta_lora+loraplus")
    assert both.controllers == get_method("delta_lora").controllers
    assert both.optim == get_method("loraplus").optim
    with pytest.raises(BadParameter, match="delta_lora and loraplus each have a parameter 'ratio'"):
        get_method("delta_lora+loraplus", ratio=4.0)
    assert get_method("dora+rslora", r=4).delta.rank.r == 4  # type: ignore[union-attr]
