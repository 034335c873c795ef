"""Adapters attached together under weights do what `mix` with these weights does."""

import pytest
import torch
from torch import nn

from lorakit import Adapted, AdapterMismatch, Incompatible, NotExportable
from lorakit.adapters.mix import mix
from lorakit.core.errors import BadParameter
from lorakit.core.layer import Slot
from lorakit.train.weights.objective import gradient, mean_loss
from lorakit.train.weights.weighed import together
from tests.adapters.subject import logits, shaken, tiny_model
from tests.laws.subject import not_fused
from tests.train.weights.world import adapter, close, dense, layer, on_layer, predicts, some, update, with_adapter

SPACES = ("delta", "factor", "factor:both")
SUBJECTS = [
    ("llama", "all-linear"),
    ("llama", ("embed_tokens", "lm_head", "q_proj")),
    ("gpt2", "qv"),
    ("gpt2", "all-linear"),
    ("mixtral", "all-linear"),
    ("mixtral", ("router", "v_proj")),
]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("arch", "sites"), SUBJECTS)
def test_they_do_what_the_mixed_adapter_does(arch: str, sites: str, space: str) -> None:
    model, adapters = tiny_model(arch), some(arch, r=2, sites=sites, alpha=3.0)
    weights = [0.7, -0.4, 1.2]
    with together(model, adapters, space=space, force=True) as here:  # type: ignore[arg-type]
        here.set_([weights])
        found = logits(model)
        with torch.enable_grad():
            fused = model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.detach()
        assert close(fused, logits(model, torch.ones(1, 4, dtype=torch.long)))
    wanted = with_adapter(model, mix(adapters, weights=weights, space=space, force=True))
    assert close(found, wanted, 2e-5)
    assert not close(found, logits(model), 1e-2)


@pytest.mark.parametrize("space", SPACES)
def test_one_weight_of_1_is_that_adapter_and_of_minus_1_its_opposite_or_in_the_papers_space_itself(space: str) -> None:
    model, adapters = tiny_model("llama"), some(r=2, alpha=6.0)
    alone = with_adapter(model, adapters[1])
    opposite = with_adapter(model, mix([adapters[1]], weights=[-1.0]))
    with together(model, adapters, space=space, force=True) as here:  # type: ignore[arg-type]
        here.set_([[0.0, 1.0, 0.0]])
        assert close(logits(model), alone)
        here.set_([[0.0, -1.0, 0.0]])
        assert close(logits(model), alone if space == "factor:both" else opposite)
    assert not close(alone, opposite, 1e-2)


@pytest.mark.parametrize("space", SPACES)
def test_a_negative_scale_is_subtracted(space: str) -> None:
    model, adapters = layer(), [adapter(update(0, s=-0.5)), adapter(update(1, s=2.0))]
    with together(model, adapters, space=space) as here:  # type: ignore[arg-type]
        here.set_([[0.7, -0.4]])
        found = (on_layer(model) - model["w"].weight).detach()
    assert close(found, dense(mix(adapters, weights=[0.7, -0.4], space=space).factors()["w"]))


@pytest.mark.parametrize("space", SPACES)
def test_weights_of_zero_are_the_base_bit_for_bit(space: str) -> None:
    model, adapters = tiny_model("llama"), some(r=2)
    base = logits(model)
    with together(model, adapters, space=space, force=True) as here:  # type: ignore[arg-type]
        assert torch.equal(logits(model), base)
        here.set_([[0.3, 0.0, 0.0]])
        assert not torch.equal(logits(model), base)


def test_sites_that_an_adapter_lacks_stay_the_others() -> None:
    model = tiny_model("llama")
    adapters = [*some(n=1, sites="attention"), *some(n=1, seed=5, sites=("q_proj", "down_proj"))]
    with together(model, adapters, force=True) as here:
        here.set_([[0.5, -0.8]])
        found = logits(model)
    assert close(found, with_adapter(model, mix(adapters, weights=[0.5, -0.8], force=True)))


@pytest.mark.parametrize("by", ["model", "layer", "module"])
def test_every_place_has_its_own_weights(by: str) -> None:
    model, adapters = tiny_model("llama"), some()
    rng = torch.Generator().manual_seed(3)
    with together(model, adapters, by=by, force=True) as here:  # type: ignore[arg-type]
        places = {"model": 1, "layer": 2, "module": 14}[by]
        assert here.v.shape == (places, 3)
        assert (
            here.adapted.params().numel() == 3 * places == here.adapted.methods["mixture"].count([b.site for b in here.adapted.branches()])
        )
        here.set_(torch.randn(places, 3, generator=rng).tolist())
        found, weights = logits(model), here.for_mix(here.rows())
    assert close(found, with_adapter(model, mix(adapters, weights=weights, force=True)), 2e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("by", ["model", "module"])
@pytest.mark.parametrize(
    ("arch", "sites", "space"),
    [
        ("llama", "all-linear", "delta"),
        ("mixtral", r"re:.*layers\.1\..*experts\.(gate_up|down)_proj", "delta"),
        ("llama", "all-linear", "factor:both"),
    ],
)  # with no router behind an adapted layer, as its choices jump
def test_gradients_are_those_of_small_steps(
    arch: str, sites: str, space: str, by: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        not_fused(monkeypatch)
    model, adapters = tiny_model(arch), some(arch, n=2, r=2, sites=sites)
    objective = predicts()
    with together(model, adapters, space=space, by=by, force=True) as here:  # type: ignore[arg-type]
        rows = torch.linspace(0.3, 0.9, here.v.numel()).view_as(here.v)
        here.set_(rows.tolist())
        loss = gradient(objective, model, here.v)
        assert loss == pytest.approx(mean_loss(objective, model), rel=1e-5)
        assert here.v.grad is not None and here.v.grad.abs().max() > 1e-2
        for place in {0, len(rows) // 2, len(rows) - 1}:
            ends = []
            for step in (1e-2, -1e-2, 2e-2, -2e-2):  # not smaller, in fp32, but of fourth order
                moved = rows.clone()
                moved[place, 1] += step
                here.set_(moved.tolist())
                ends.append(mean_loss(objective, model))
            slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / 0.12
            assert here.v.grad[place, 1].item() == pytest.approx(slope, rel=2e-3, abs=5e-4)


def test_the_fused_function_is_used() -> None:
    model = tiny_model("llama")
    slots = [m for m in model.modules() if isinstance(m, Slot)]
    assert not slots
    with together(model, some(), force=True):
        slot = next(m for m in model.modules() if isinstance(m, Slot))
        assert slot.layer(torch.zeros(1, 4, 32)) is not None


def test_only_the_weights_learn_and_the_adapters_stay_as_they_are() -> None:
    model, adapters = tiny_model("llama"), some(n=2)
    before = [{k: v.clone() for k, v in one.tensors.items()} for one in adapters]
    with together(model, adapters, force=True) as here:
        gradient(predicts(), model, here.v)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lora_shared.mixture.pool.v"]
        assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("pool.v"))
    assert all(torch.equal(was[k], one.tensors[k]) for was, one in zip(before, adapters, strict=True) for k in was)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = tiny_model("llama").train()
    model.lm_head.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes, trains = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    try:
        with together(model, some(), force=True) as here:
            here.set_([[1.0, 2.0, 3.0]])
            mean_loss(predicts(), model)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert model.training and [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == trains
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_a_bf16_model_takes_weights_in_fp32() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    with together(model, some(), force=True) as here:
        assert here.v.dtype == torch.float32
        here.set_([[1e-4, 0.5, 1.0]])
        assert here.rows()[0][0] == pytest.approx(1e-4, rel=1e-6)
        assert torch.isfinite(logits(model)).all()


# ------------------------------------------------------------------------------------------------------------------------ refusals
def test_ranks_that_factor_space_cannot_add_up() -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(Incompatible, match=r"ranks \[2, 3, 4\] do not allow; use space='delta'"),
        together(model, some(), space="factor:both"),
    ):
        pass
    assert not any(isinstance(m, Slot) for m in model.modules())


def test_another_base_is_refused_unless_forced() -> None:
    adapters, other = some(), tiny_model("llama", seed=1)
    with pytest.raises(AdapterMismatch, match="was trained on"), together(other, adapters):
        pass
    with together(other, adapters, force=True):
        pass


def test_a_base_of_other_shapes_is_refused_always() -> None:
    smaller = tiny_model("llama", intermediate_size=48)
    with pytest.raises(AdapterMismatch, match="made for a base of other shapes"), together(smaller, some(), force=True):
        pass
    assert type(smaller.lm_head) is nn.Linear


def test_what_has_no_factors_is_refused() -> None:
    one = shaken(tiny_model("llama"), "dora").state()
    with pytest.raises(NotExportable, match="adapter 2"), together(tiny_model("llama"), [*some(n=1), one]):
        pass


def test_an_adapted_model_and_no_adapter_are_refused() -> None:
    adapted: Adapted = shaken(tiny_model("llama"), "lora", r=2)
    with pytest.raises(Incompatible, match="already adapted"), together(adapted.model, some()):
        pass
    assert adapted.active == ("default",)
    with pytest.raises(BadParameter, match="no adapter was given"), together(tiny_model("llama"), []):
        pass
