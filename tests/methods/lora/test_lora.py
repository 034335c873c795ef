"""LoRA's acceptance properties (arXiv:2106.09685)."""

import pytest
import torch

from lorakit import Adapter, Site, attach, get_method
from lorakit.core.method import Recipe
from tests.laws.steps import Run
from tests.laws.subject import awaken, base, batch, far, logits, same_bits, small, subject
from tests.methods.tools import fit, layer, teacher


def gpt3(role: str, i: int) -> Site:
    return Site(f"layers.{i}.{role}", "linear", 12288, 12288, i, role)


def test_counts_of_the_survey_and_the_paper() -> None:
    up = Site("up", "linear", 4096, 11008, 0, "up")
    assert get_method("lora", r=4).count([up]) == 60_416
    assert up.d_in * up.d_out == 45_088_768
    sites = [gpt3(role, i) for i in range(96) for role in "qv"]
    assert get_method("lora", r=4).count(sites) == 18_874_368 == 2 * len(sites) * 12288 * 4
    assert get_method("lora", r=4).count(sites) * 2 / 2**20 == 36.0, "MiB in fp16: the paper's 35 MB"
    assert get_method("lora", r=1).count(sites) == 4_718_592, "the paper's 4.7M"


def test_defaults() -> None:
    adapted = subject("lora", awake=False, r=8)
    assert {(b.delta.r, b.delta.s, b.delta.p) for b in adapted.branches()} == {(8, 2.0, 0.0)}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_the_start_is_the_base_bit_for_bit(training: bool, dropout: float) -> None:
    model = base().train(training)
    want = logits(model, batch())
    assert same_bits(logits(attach(model, get_method("lora", dropout=dropout)).model, batch()), want)


def test_rank_is_r_after_training() -> None:
    adapted = subject("lora", dtype=torch.float64, awake=False)
    Run(adapted, total=8).steps(6)
    for branch in adapted.branches():
        values = torch.linalg.svdvals(branch.weight().detach())
        assert values[3] > 1e-6 * values[0] > values[4] * 1e6


def test_a_hundred_merges_restore_the_base_where_subtraction_drifts() -> None:
    adapted = subject("lora", dtype=torch.bfloat16, sites="q_proj")
    awaken(adapted.add("b", small("lora", sites="q_proj"), seed=1), seed=2)
    (host, *_) = [b.host.module for b in adapted.branches()]
    before = host.weight.detach().clone()
    drifting = before.clone()
    for i in range(100):
        adapted.switch(("default", "b")[i % 2])
        change = adapted.branches()[0].weight().detach()
        drifting += change.bfloat16()
        drifting -= change.bfloat16()
        adapted.merge()
        assert not torch.equal(host.weight, before)
        adapted.unmerge()
    assert same_bits(host.weight.detach(), before)
    assert (drifting != before).float().mean() > 0.01, "so the law is no triviality"


def test_merged_equals_unmerged() -> None:
    for arch in ("llama", "gpt2", "bert"):
        adapted = subject("lora", arch)
        live = logits(adapted.model, batch())
        assert (logits(adapted.merge(), batch()) - live).abs().max() <= 1e-5


@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_teacher_of_rank_at_most_r_is_fitted(k: int) -> None:
    adapted = layer(get_method("lora", r=4, sites="w"))
    assert fit(adapted, teacher(10, 12, [3.0, 2.0, 1.0, 0.5][:k])) < 1e-8


def test_a_teacher_of_higher_rank_is_fitted_to_the_eckart_young_floor_exactly() -> None:
    values = [3.0, 2.5, 2.0, 1.5, 1.0, 0.5]
    adapted = layer(get_method("lora", r=4, sites="w"))
    floor = 1.0**2 + 0.5**2
    assert fit(adapted, teacher(10, 12, values)) == pytest.approx(floor, rel=1e-6)


def test_switching_is_exchanging_adapters() -> None:
    """The adapter alone moves a behavior from one model object to another of the same base."""
    trained = subject("lora")
    state = trained.state()
    rebuilt = Adapter(Recipe("lora", dict(state.recipe.kwargs)), state.sites, dict(state.tensors))
    other = attach(base(), get_method("lora"), name="x").add("y", rebuilt)
    assert far(logits(other.model, batch()), logits(trained.model, batch())) == 0.0
