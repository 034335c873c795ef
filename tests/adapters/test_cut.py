"""Any change of weights as plain LoRA: exact, or the closest of its rank, with the error that it says."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit.adapters.cut import META, Cut, cut_one, to_plain
from lorakit.adapters.digest import digest
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach_adapter
from lorakit.core.delta import Factors
from lorakit.core.method import describe
from tests.adapters.subject import logits, shaken, tiny_model
from tests.laws.subject import SMALL

KWARGS: dict = {"prefix": {}, "adapter_houlsby": {"r": 4}}
FACTORS = ("lora", "rslora", "pissa", "adalora", "vera", "lora_xs", "krona", "melora", "vb_lora", "relora", "lora_fa")


def made(name: str, arch: str = "llama", **kwargs: object) -> tuple[Adapter, nn.Module]:
    """A trained adapter and its base."""
    small = {key: value for key, value in {**SMALL, "r": 4}.items() if key in describe(name).parameters}
    adapted = shaken(tiny_model(arch), name, **{**small, "sites": ["q_proj", "down_proj"], **kwargs})
    return adapted.state(), tiny_model(arch)


def changes(adapter: Adapter, base: nn.Module) -> dict[str, Tensor]:
    """ΔW of every site in fp64, by merging into a copy of the base."""
    model = copy.deepcopy(base).double()
    before = {site.name: model.get_parameter(f"{site.module}.{site.attribute}").detach().clone() for site in adapter.sites}
    merged = attach_adapter(model, adapter).merge_and_unload()
    return {site.name: merged.get_parameter(f"{site.module}.{site.attribute}").detach() - before[site.name] for site in adapter.sites}


@pytest.mark.parametrize("name", FACTORS)
def test_what_has_factors_is_exact(name: str) -> None:
    adapter, base = made(name)
    plain = to_plain(adapter)
    assert (plain.adapter.recipe.name, plain.lines(), plain.errors) == ("lora", ["plain LoRA, exact"], {})
    wanted = changes(adapter, base)
    for site, delta in changes(plain.adapter, base).items():
        torch.testing.assert_close(delta, wanted[site], atol=1e-6, rtol=1e-5)


def test_factors_wider_than_the_matrix_are_no_wider_afterwards() -> None:
    adapter, base = made("vera", r=100)
    plain = to_plain(adapter).adapter
    assert {t.shape[0] for name, t in plain.tensors.items() if name.endswith(".A")} == {32}
    wanted = changes(adapter, base)
    for site, delta in changes(plain, base).items():
        torch.testing.assert_close(delta, wanted[site], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 200])
@pytest.mark.parametrize("name", [*FACTORS, "fourierft", "dora"])
def test_the_error_is_the_measured_one_and_the_least(name: str, rank: int) -> None:
    adapter, base = made(name)
    found = to_plain(adapter, Cut(rank=rank), model=base)
    wanted, got = changes(adapter, base), changes(found.adapter, base)
    tails, whole = 0.0, 0.0
    for site, delta in wanted.items():
        values = torch.linalg.svdvals(delta)
        error = float((got[site] - delta).norm() / delta.norm())
        assert abs(found.errors[site] - error) < 1e-6
        assert abs(found.errors[site] - float(values[rank:].norm() / values.norm())) < 1e-6
        assert torch.linalg.matrix_rank(got[site], rtol=1e-6) <= rank
        tails, whole = tails + float((got[site] - delta).norm() ** 2), whole + float(delta.norm() ** 2)
    assert abs(found.total - math.sqrt(tails / whole)) < 1e-6
    assert found.lines()[-1] == f"in total: relative error {found.total:.2e}"


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_an_energy_is_reached_by_the_fewest(energy: float) -> None:
    adapter, base = made("fourierft")
    found = to_plain(adapter, Cut(energy=energy))
    for site, delta in changes(adapter, base).items():
        squares = torch.linalg.svdvals(delta).square()
        q = found.adapter.tensors[f"{site}.A"].shape[0]
        assert squares[:q].sum() >= (energy - 1e-9) * squares.sum()
        assert q == 1 or squares[: q - 1].sum() < energy * squares.sum() * (1 + 1e-9)
        assert 1 - found.errors[site] ** 2 >= energy - 1e-9


def test_both_are_the_smaller() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [Cut(rank=2, energy=0.99).kept(values), Cut(rank=9, energy=0.5).kept(values), Cut(rank=9).kept(values)] == [2, 2, 4]
    assert Cut(energy=0.5).kept(torch.zeros(3)) == 1


def test_of_a_stack_every_expert_is_cut_by_itself_to_one_rank() -> None:
    rng = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 4, 6, generator=rng), torch.randn(3, 5, 4, generator=rng)
    pair, tail, whole = cut_one(Factors(A, B, 2.0), Cut(rank=2))
    assert (pair.A.shape, pair.B.shape) == ((3, 2, 6), (3, 5, 2))
    dense = 2.0 * B.double() @ A.double()
    values = torch.linalg.svdvals(dense)
    assert tail == pytest.approx(values[:, 2:].square().sum().item())
    assert whole == pytest.approx(values.square().sum().item())
    assert (dense - pair.B.double() @ pair.A.double()).square().sum().item() == pytest.approx(tail, rel=1e-5)
    assert cut_one(dense, Cut(rank=2))[1] == pytest.approx(tail)


def test_experts_of_a_mixture() -> None:
    adapted = shaken(tiny_model("mixtral"), "lora", sites=["down_proj"], r=3)
    found = to_plain(adapted.state(), Cut(rank=3))
    model = tiny_model("mixtral")
    torch.testing.assert_close(logits(attach_adapter(model, found.adapter).model), logits(adapted.model), atol=1e-5, rtol=1e-4)
    assert found.total < 1e-9


def test_what_was_trained_whole_stays(tmp_path) -> None:
    adapted = shaken(tiny_model("llama"), "pissa", sites=["q_proj"], unfreeze=("norm",))
    found = to_plain(adapted.state())
    save_adapter(found.adapter, tmp_path / "a")
    model = tiny_model("llama")
    again = load_adapter(tmp_path / "a")
    torch.testing.assert_close(logits(attach_adapter(model, again).model), logits(adapted.model), atol=1e-5, rtol=1e-4)
    assert any(name.endswith("norm.weight") for name in again.unfrozen())


def test_the_result_says_how_it_was_made() -> None:
    adapter, _ = made("fourierft")
    adapter.meta.update({"base": {"name": "x", "checkpoint": None, "rows": None}, "metrics": {"loss": 1.0}})
    found = to_plain(adapter, Cut(rank=2))
    record = found.adapter.meta[META]
    assert (record["of"], record["rank"], record["energy"]) == ("fourierft", 2, None)
    assert (record["error"], record["errors"]) == (found.total, found.errors)
    assert record["sha256"] == digest(found.adapter.tensors)
    assert "metrics" not in found.adapter.meta
    assert found.adapter.meta["base"]["name"] == "x"
    assert META not in to_plain(made("lora")[0]).adapter.meta


@pytest.mark.parametrize(
    ("name", "cut", "said"),
    [
        ("fourierft", None, r"has no factors at \d+ sites.*--rank R \(or --energy 0.99\)"),
        ("dora", None, r"rescales W itself.*--rank R"),
        ("dora", Cut(rank=2), r"give the model \(--model\)"),
        ("bitfit", Cut(rank=2), "bitfit changes more than weights at its sites"),
        ("bitfit", None, "bitfit"),
        ("adapter_houlsby", Cut(rank=2), "adapter_houlsby is more than a change of weights: "),
        ("prefix", Cut(rank=2), "more than a change of weights|adapts no site"),
    ],
)
def test_what_is_no_low_rank_change_is_refused_with_the_reason(name: str, cut: Cut | None, said: str) -> None:
    adapter = shaken(tiny_model("llama"), name, **KWARGS.get(name, {"sites": ["q_proj"]})).state()
    with pytest.raises(lorakit.NotExportable, match=said):
        to_plain(adapter, cut)


@pytest.mark.parametrize("kwargs", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"energy": math.nan}])
def test_a_cut_that_is_none(kwargs: dict) -> None:
    with pytest.raises(lorakit.BadParameter):
        Cut(**kwargs)
