"""Ranks of planted spectra, intruders that were planted, PEFT's own count of them, and a full fine-tuning's update."""

import io
import json
import math

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.intruders import reduce_intruder_dimension
from rich.console import Console
from torch import Tensor

from lorakit.adapters.diagnose.spectrum import effective_rank, likeness, rank_of, spectra, spectra_of_tuning
from lorakit.adapters.diagnose.update import factored
from lorakit.adapters.inspect import inspect_adapter
from lorakit.adapters.io import load_adapter
from lorakit.core.delta import Factors
from lorakit.core.errors import AdapterMismatch, BadParameter
from tests.adapters.diagnose.subject import dense, random_adapter, resplit, without_rank
from tests.adapters.subject import made_by_peft, quiet, shaken, tiny_model


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(5, 9), st.integers(5, 9), st.integers(0, 10**6))
def test_every_figure_is_that_of_the_dense_update(r, d_out, d_in, seed):
    adapter = random_adapter({"x.q": (d_out, d_in)}, r=r, seed=seed)
    (W,) = dense(adapter).values()
    values = torch.linalg.svdvals(W)[:r]
    for one in (adapter, resplit(adapter)):
        (found,) = spectra(one, intruders=False).sites
        f = found.figures
        torch.testing.assert_close(torch.tensor(found.singular_values, dtype=torch.float64), values, rtol=1e-4, atol=1e-5)
        assert f["norm"] == pytest.approx(W.norm().item(), rel=1e-5)
        assert f["stable_rank"] == pytest.approx((W.square().sum() / values[0] ** 2).item(), rel=1e-4)
        kept = [values[:k].square().sum() / values.square().sum() for k in range(r + 1)]
        if min(abs(k - 0.9) for k in kept) > 1e-4:
            assert kept[f["rank90"]] >= 0.9 > kept[f["rank90"] - 1]
        assert (f["rank"], f["intruders"]) == (r, None)


def test_ranks_of_known_spectra():
    flat = torch.ones(20)
    assert (rank_of(flat, 0.9), rank_of(flat, 1.0), effective_rank(flat)) == (18, 20, pytest.approx(20))
    assert rank_of(torch.tensor([3.0, 1.0]), 0.9) == 1
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(0.9**-0.9 * 0.1**-0.1)
    assert rank_of(torch.tensor([3.0, 1.0]), 0.91) == 2
    assert (rank_of(torch.zeros(0), 0.9), effective_rank(torch.zeros(0)), effective_rank(torch.zeros(3))) == (0, 0.0, 0.0)


def test_a_planted_stranger_is_an_intruder_and_a_familiar_direction_is_not():
    W = draw(0, 32, 40)
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    strange, familiar = U[:, :16].mean(1) * 4, U[:, 5]  # the first has a cosine of 1/4 with 16 of W's own
    for u, among in ((strange, False), (familiar, True)):
        update = factored(Factors(draw(1, 1, 40), 10 * S[0] * u[:, None], 1.0))[0]
        found = likeness(W, update, 1).item()
        assert (found > 0.9) if among else (found == pytest.approx(0.25, abs=0.05))
    both = factored(Factors(draw(1, 2, 40), 10 * S[0] * torch.stack([strange, familiar], 1), 1.0))[0]
    after = torch.linalg.svd(W.double() + both.rows(slice(None))).U[:, :10]
    expected = (U.double().T @ after).abs().amax(0)
    torch.testing.assert_close(likeness(W, both, 10).double(), expected, atol=1e-4, rtol=0)


def test_without_an_update_nothing_is_strange():
    zero = factored(Factors(torch.zeros(2, 5), torch.zeros(4, 2), 1.0))[0]
    assert likeness(draw(0, 4, 5), zero).tolist() == [1.0] * 4


def test_as_many_intruders_as_peft_counts(tmp_path):
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"])
    made = made_by_peft(model, config, tmp_path)
    lines: list[str] = []
    with quiet():
        reduce_intruder_dimension(made, logging_sink=lines.append)
    theirs = {}
    for name, count in (line.split(": ", 1) for line in lines if "ntruders" in line):
        theirs[name.removeprefix("base_model.model.")] = int(count.split(": ")[1]) if ": " in count else 0
    ours = {s.name: s.figures["intruders"] for s in spectra(load_adapter(tmp_path, model=model), model).sites}
    assert ours == theirs
    assert len(ours) == 6
    assert sum(ours.values()) > 0


def test_how_many_are_looked_at_and_what_counts():
    model, adapter = tiny_model("llama"), shaken(tiny_model("llama"), "lora", r=4, alpha=64, sites=["q_proj"]).state()
    cosines = spectra(adapter, model).sites[0].cosines
    assert len(cosines) == 10
    for epsilon in (0.2, 0.4, 0.9):
        found = spectra(adapter, model, epsilon=epsilon, top=5).sites[0]
        assert found.cosines == cosines[:5]
        assert found.figures["intruders"] == sum(c < epsilon for c in cosines[:5])
    for wrong in ({"top": 0}, {"epsilon": 0.0}, {"epsilon": 1.5}):
        with pytest.raises(BadParameter, match="expected at least one singular vector, and a cosine"):
            spectra(adapter, model, **wrong)
    with pytest.raises(BadParameter, match="--model"):
        spectra(adapter)


def test_of_experts_each_and_of_parts_their_own_rows():
    adapter = shaken(tiny_model("mixtral"), "lora", r=2, sites=["down_proj"]).state()
    found = spectra(adapter, tiny_model("mixtral")).sites
    assert [s.name for s in found[:4]] == [f"{adapter.sites[0].name}[{e}]" for e in range(4)]
    model, adapter = tiny_model("gpt2"), shaken(tiny_model("gpt2"), "lora", r=2, alpha=64, sites=["c_attn[k]"]).state()
    found = spectra(adapter, model).sites[0]
    W = model.get_submodule(found.name[:-3]).weight.T[32:64].double()
    (delta, *_) = adapter.deltas().values()
    after = torch.linalg.svd(W + delta.weight().double()).U[:, :10]
    expected = (torch.linalg.svd(W).U.T @ after).abs().amax(0)
    torch.testing.assert_close(torch.tensor(found.cosines, dtype=torch.float64), expected, atol=1e-3, rtol=0)


def test_of_no_rank_there_is_no_spectrum_and_nothing_strange():
    adapter = without_rank(random_adapter({"x.q": (6, 7)}, method="eva"), "x.q")
    (found,) = spectra(adapter, intruders=False).sites
    assert found.singular_values == []
    assert [found.figures[name] for name in ("norm", "rank", "rank90", "stable_rank", "effective_rank")] == [0.0, 0, 0, 0.0, 0.0]
    assert inspect_adapter(adapter).sites[0].norm == 0.0


def test_a_method_without_factors():
    adapter = shaken(tiny_model("llama"), "fourierft", sites=["q_proj"]).state()
    for found, delta in zip(spectra(adapter, intruders=False).sites, adapter.deltas().values(), strict=True):
        values = torch.linalg.svdvals(delta.weight().double())
        torch.testing.assert_close(torch.tensor(found.singular_values, dtype=torch.float64), values[: len(found.singular_values)])
        assert values[len(found.singular_values) :].sum() < 1e-4 * values[0]


def test_a_full_fine_tuning():
    base, tuned = tiny_model("llama"), tiny_model("llama")
    name = "model.layers.1.mlp.up_proj"
    change = draw(1, 64, 3) @ draw(2, 3, 32)
    with torch.no_grad():
        tuned.get_submodule(name).weight += change
    found = {s.name: s for s in spectra_of_tuning(base, tuned, where=["up_proj", "q_proj"]).sites}
    assert {n: s.figures["rank90"] > 0 for n, s in found.items()} == {n: n == name for n in found}
    values = torch.linalg.svdvals(change.double())
    assert found[name].figures["norm"] == pytest.approx(change.norm().item(), rel=1e-5)
    assert found[name].figures["stable_rank"] == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-4)
    W = base.get_submodule(name).weight.detach()
    expected = likeness(W, factored(Factors(change, torch.eye(64), 1.0))[0])
    torch.testing.assert_close(torch.tensor(found[name].cosines), expected, atol=1e-4, rtol=0)
    assert len(spectra_of_tuning(base, tuned, intruders=False).sites) == 14
    with pytest.raises(AdapterMismatch, match=r"q_proj is 32 × 32 in the base, and the tuned model has 64 × 64"):
        spectra_of_tuning(base, tiny_model("llama", hidden_size=64))
    with pytest.raises(AdapterMismatch, match="the tuned model has none"):
        spectra_of_tuning(base, tiny_model("gpt2"))


def test_a_full_fine_tuning_of_parts_of_a_fused_weight():
    base, tuned = tiny_model("gpt2"), tiny_model("gpt2")
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight[:, 32:64] += torch.outer(draw(1, 32), draw(2, 32))
    found = spectra_of_tuning(base, tuned, where=["c_attn[q]", "c_attn[k]"]).sites
    assert [(s.d_out, s.figures["rank90"]) for s in found] == [(32, 0), (32, 1), (32, 0), (32, 0)]


def test_the_table_and_json():
    found = spectra(shaken(tiny_model("llama"), "lora", r=2, sites=["q_proj"]).state(), tiny_model("llama"), name="mine")
    out = Console(file=io.StringIO(), width=140)
    out.print(found.table())
    assert all(text in out.file.getvalue() for text in ("spectra of mine", "32×32", "of 10"))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["sites"][0]["rank"] == 2
    assert all(math.isfinite(s["stable_rank"]) for s in found.as_dict()["sites"])
