"""`mix_into`: the whole change of each weight, written into the base."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import MIXERS, mix, mix_into
from lorakit.adapters.mix.recipe import made_into, read_recipe
from lorakit.core.base import base_of
from lorakit.core.errors import AdapterMismatch, BadParameter, Incompatible
from lorakit.core.site import sites_of
from tests.adapters.mix.values import close
from tests.adapters.subject import logits, shaken, tiny_model

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"sites": "all-linear"}),
    ("gpt2", {"sites": "attention"}),  # Conv1D, parts of a fused weight
    ("mixtral", {"sites": "experts"}),
]


def some(model: str, **options: Any) -> list[lorakit.Adapter]:
    return [shaken(tiny_model(model), "lora", seed=i, r=2, **options).state() for i in (1, 2)]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """W of every site, as d_out × d_in."""
    return {s.name: base_of(model.get_submodule(s.module), s.attribute).dense().double() for s in sites_of(model) if s.rows is None}


def changes(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: W - before[name] for name, W in weights(model).items()}


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_a_sum_is_what_the_mixture_does_when_it_is_merged(name: str, options: dict[str, Any]) -> None:
    adapters, model, other = some(name, **options), tiny_model(name), tiny_model(name)
    record = mix_into(model, adapters, weights=[0.7, -0.4])
    merged = lorakit.core.attach.attach_adapter(other, mix(adapters, weights=[0.7, -0.4])).merge_and_unload()
    assert all(torch.allclose(W, merged.state_dict()[key], atol=1e-6) for key, W in model.state_dict().items())
    assert torch.allclose(logits(model), logits(merged), atol=1e-5)
    assert record["weights"] == [0.7, -0.4]
    assert [source["recipe"] for source in record["sources"]] == ["lora", "lora"]


@pytest.mark.parametrize("how", ["ties", "dare_ties", "magnitude_prune"])
def test_nothing_is_cut_off(how: str) -> None:
    """A mixture of low rank leaves a part out, and the change of the base has it."""
    adapters, model = some("llama"), tiny_model("llama")
    before = weights(model)
    mix_into(model, adapters, how, density=0.3)
    found, cut = changes(model, before), mix(adapters, how, density=0.3)
    assert cut.meta["mix"]["lost"]["total"] > 0.05
    low = {name: f.s * f.B.double() @ f.A.double() for name, f in cut.factors().items()}
    gap = torch.stack([(found[name] - W).norm() for name, W in low.items()]).norm() / torch.stack([found[n].norm() for n in low]).norm()
    assert gap.item() == pytest.approx(cut.meta["mix"]["lost"]["total"], rel=0.02)
    name, W = next((n, W) for n, W in found.items() if n in low)
    assert torch.linalg.matrix_rank(W) > 4
    kept = (W.abs() > 1e-9).double().mean().item()
    assert 0.2 < kept < 0.6, name


def test_the_whole_and_its_closest_update_of_low_rank() -> None:
    """Every mixer: what `mix` makes is the change cut to Σ r."""
    adapters = some("llama", sites="q_proj")
    for how in (name for name, m in MIXERS.items() if m.rule().needs is None):
        model = tiny_model("llama")
        before = weights(model)
        mix_into(model, adapters, how, seed=3)
        found, cut = changes(model, before), mix(adapters, how, seed=3)
        for name, f in cut.factors().items():
            U, S, Vh = torch.linalg.svd(found[name])
            q = len(f.A)
            assert close(f.s * f.B.double() @ f.A.double(), U[:, :q] * S[:q] @ Vh[:q], 0.02), (how, name)


def test_parts_of_a_fused_weight_leave_the_rest_alone() -> None:
    adapters, model = some("gpt2", sites=r"re:.*\[q\]$"), tiny_model("gpt2")
    before = weights(model)
    mix_into(model, adapters)
    found = changes(model, before)
    name = next(site.whole for site in adapters[0].sites)
    d = found[name].shape[0] // 3
    assert found[name][:d].any()
    assert not found[name][d:].any()


def test_a_tied_weight_is_untied() -> None:
    model = tiny_model("llama", tied=True)
    adapters = [shaken(copy.deepcopy(model), "lora", seed=1, r=2, sites=("lm_head",)).state()]
    embeddings = model.get_input_embeddings().weight.clone()
    mix_into(model, adapters, weights=[1.0])
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert not torch.equal(model.lm_head.weight, embeddings)
    assert model.config.tie_word_embeddings is False


def test_it_is_rounded_once_and_in_the_weights_own_dtype() -> None:
    adapters, model = some("llama"), tiny_model("llama")
    half = copy.deepcopy(model).to(torch.bfloat16)
    mix_into(half, adapters, force=True)
    wide = copy.deepcopy(model).to(torch.bfloat16).float()
    mix_into(wide, adapters, force=True)
    assert all(torch.equal(W, wide.state_dict()[key].bfloat16()) for key, W in half.state_dict().items())


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path) -> None:
    adapters, model = some("llama"), tiny_model("llama")
    before = {key: W.clone() for key, W in model.state_dict().items()}
    with pytest.raises(BadParameter, match="1 weights for 2 adapters"):
        mix_into(model, adapters, weights=[1.0])
    with pytest.raises(BadParameter, match="no option 'density'"):
        mix_into(model, adapters, density=0.5)
    last = adapters[1].sites[-1].name
    damaged = dataclasses.replace(
        adapters[1], tensors={**adapters[1].tensors, f"{last}.A": adapters[1].of(adapters[1].sites[-1])["A"] * math.nan}
    )
    with pytest.raises(AdapterMismatch, match="adapter 2 holds NaN"):
        mix_into(model, [adapters[0], damaged])
    grams = [{site.name: torch.eye(site.d_in) for site in one.sites} for one in adapters]
    del grams[1][last]
    with pytest.raises(BadParameter, match="stats has none"):
        mix_into(model, adapters, "regmean", stats=grams)
    other = tiny_model("llama", seed=5)
    with pytest.raises(AdapterMismatch, match="the adapter was trained on"):
        mix_into(other, adapters)
    with pytest.raises(AdapterMismatch, match="the model has no such weight"):
        mix_into(tiny_model("gpt2"), adapters, force=True)
    lorakit.attach(model, lorakit.get_method("lora", r=2))
    with pytest.raises(Incompatible, match="has adapters on it"):
        mix_into(model, adapters)
    assert all(torch.equal(W, before[key]) for key, W in before.items())


def test_a_tree_of_mixes_ends_in_the_base(tmp_path: Path) -> None:
    adapters, model = some("llama"), tiny_model("llama")
    for name, one in zip("ab", adapters, strict=True):
        save_adapter(one, tmp_path / name)
    (tmp_path / "recipe.yaml").write_text("how: ties\ndensity: 0.3\nof: [a, {how: linear, of: [a, b]}]")
    made_into(read_recipe(tmp_path / "recipe.yaml"), model, load=load_adapter)
    other = tiny_model("llama")
    mix_into(other, [adapters[0], mix(adapters)], "ties", density=0.3)
    assert all(torch.equal(W, other.state_dict()[key]) for key, W in model.state_dict().items())
