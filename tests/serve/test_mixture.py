"""Finished adapters mixed by weights that are given with the forward."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lorakit.adapters.mix import mix
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch, BadParameter, Incompatible, NotExportable
from lorakit.serve import mixture as module
from lorakit.serve.mixture import FORMS, Mixture, attach_mixture
from tests.laws.subject import everything, same_bits
from tests.serve.values import IDS, alone, equals, far, logits, made, several, tiny_model


def on(adapters: dict[str, Adapter], form: str = "outputs", arch: str = "llama") -> Mixture:
    return attach_mixture(tiny_model(arch), adapters, form=form)


def run(mixture: Mixture, g: Tensor, ids: Tensor = IDS) -> Tensor:
    with mixture.weighted(g):
        return logits(mixture.adapted.model, ids)


def sites(mixture: Mixture, role: str) -> Iterator[torch.nn.Module]:
    return (branch.host.module for branch in mixture.adapted.branches() if branch.site.role == role)


# ------------------------------------------------------------------------------------------------------------------- what it computes
@pytest.mark.parametrize("form", FORMS)
def test_all_weight_on_one_is_that_one(form: str) -> None:
    """Of any method, rank, scale and sites; at one rank also where factors are mixed."""
    adapters = several() if form == "outputs" else equals()
    mixture = on(adapters, form)
    for i, adapter in enumerate(adapters.values()):
        want = alone(adapter)
        assert far(run(mixture, torch.eye(len(adapters))[i]), want) < 1e-5
        assert far(run(mixture, torch.eye(len(adapters))[i - 1]), want) > 1e-2


@pytest.mark.parametrize(("form", "space"), [("outputs", "delta"), ("factors", "factor:both")])
def test_it_is_the_mix_at_rest(form: str, space: str) -> None:
    adapters = equals()
    weights = [0.5, -0.3, 1.2]
    want = alone(mix(list(adapters.values()), weights=weights, space=space))
    assert far(run(on(adapters, form), torch.tensor(weights)), want) < 1e-5
    other = "factors" if form == "outputs" else "outputs"
    assert far(run(on(adapters, other), torch.tensor(weights)), want) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_each_sample_has_its_own_weights_and_no_others(form: str) -> None:
    mixture = on(equals(), form)
    g = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [-0.4, 0.9, 0.1]])
    whole = run(mixture, g)
    for i in range(len(IDS)):
        assert far(whole[i], run(mixture, g[i : i + 1], IDS[i : i + 1])[0]) < 1e-5
        assert far(whole[i], run(mixture, g[i - 1 : i or None], IDS[i : i + 1])[0]) > 1e-3
    other = IDS.clone()
    other[2] = IDS[0]
    changed = run(mixture, torch.cat([g[:2], g[:1]]), other)
    assert far(changed[:2], whole[:2]) < 1e-6


def test_mixture_less_fusion_is_a_quarter_of_the_product_of_the_differences() -> None:
    """Closed form for two of equal s: (s/4)(B₁ − B₂)(A₁ − A₂) x, nothing where A or B are the same."""
    adapters = equals(2, alpha=3.0, sites=["q_proj"])
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    found: dict[str, Tensor] = {}
    for form in FORMS:
        mixture = on(adapters, form)
        with mixture.weighted([0.5, 0.5]), torch.no_grad():
            found[form] = next(sites(mixture, "q"))(x)
    one, two = (next(iter(a.factors().values())) for a in adapters.values())
    want = one.s / 4 * x @ (one.A - two.A).T @ (one.B - two.B).T
    assert far(found["outputs"] - found["factors"], want) < 1e-4


def test_the_closed_form_at_equal_A() -> None:
    first = made(1, r=2, sites=["q_proj"])
    second = made(2, r=2, sites=["q_proj"])
    tensors = {k: (first.tensors[k] if k.endswith(".A") else v) for k, v in second.tensors.items()}
    adapters = {"one": first, "two": Adapter(second.recipe, second.sites, tensors, second.meta)}
    outputs, factors = (run(on(adapters, form), torch.tensor([0.5, 0.5])) for form in FORMS)
    assert far(outputs, factors) < 1e-5


def test_plus_and_minus_the_same_is_the_base() -> None:
    same = made(1, r=2)
    assert far(run(on({"a": same, "b": same}), torch.tensor([1.0, -1.0])), logits(tiny_model("llama"), IDS)) < 1e-5


@pytest.mark.parametrize(
    ("arch", "where"), [("gpt2", ["c_attn[q]", "c_attn[v]", "c_proj"]), ("gpt_neox", ["query_key_value"]), ("bert", "attention")]
)
def test_other_layers(arch: str, where: object) -> None:
    """Transposed weights, parts of fused ones, biases."""
    adapters = {f"a{i}": made(i, arch=arch, r=2, sites=where) for i in range(2)}
    want = alone(mix(list(adapters.values()), weights=[0.6, 0.4]), arch=arch)
    assert far(run(on(adapters, arch=arch), torch.tensor([0.6, 0.4])), want) < 1e-5


def test_decoding_with_a_cache_is_one_forward() -> None:
    mixture = on(several())
    g = torch.tensor([[0.3, 0.7, 0.0, 0.2], [1.0, 0.0, 0.5, 0.0], [0.0, 0.1, 0.2, 0.3]])
    whole = run(mixture, g)
    cache, out = None, []
    with mixture.weighted(g), torch.no_grad():
        for piece in (IDS[:, :5], *IDS[:, 5:].split(1, 1)):
            one = mixture.adapted.model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = one.past_key_values
            out.append(one.logits)
        made_by = mixture.adapted.model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert far(torch.cat(out, 1), whole) < 1e-5
    with mixture.weighted(g[1]):
        single = mixture.adapted.model.generate(IDS[1:2], max_new_tokens=4, do_sample=False)
    assert made_by[1, : single.shape[1]].tolist() == single[0].tolist()


# --------------------------------------------------------------------------------------------------------------- what it leaves alone
def test_the_base_is_there_once_and_comes_back_whole() -> None:
    model = tiny_model("llama")
    before = everything(model)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    mixture = attach_mixture(model, several())
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in places} == places
    assert len(mixture.adapted.params()) == 0, "nothing of it trains"
    mixture.adapted.detach()
    assert before.keys() == everything(model).keys()
    assert all(same_bits(before[name], tensor) for name, tensor in everything(model).items())


def test_weights_hold_within_the_block_only() -> None:
    mixture = on(several())
    with mixture.weighted([1.0, 0.0, 0.0, 0.0]):
        outer = logits(mixture.adapted.model, IDS)
        with mixture.weighted([0.0, 1.0, 0.0, 0.0]):
            assert far(logits(mixture.adapted.model, IDS), outer) > 1e-2
        assert same_bits(logits(mixture.adapted.model, IDS), outer)
    with pytest.raises(Incompatible, match="no weights are in force"):
        logits(mixture.adapted.model, IDS)
    with mixture.adapted.disabled():
        assert same_bits(logits(mixture.adapted.model, IDS), logits(tiny_model("llama"), IDS))


def test_weights_by_name() -> None:
    mixture = on(several())
    assert mixture.row({"a2": 0.5, "a0": -1.0}).tolist() == [-1.0, 0.0, 0.5, 0.0]
    with pytest.raises(BadParameter, match="no adapter is called 'a9'"):
        mixture.row({"a9": 1.0})


# ------------------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("g", "said"),
    [
        ([0.5, 0.5], "shape"),
        (torch.zeros(2, 3, 4), "shape"),
        ([float("nan"), 0.0, 0.0, 0.0], "not finite"),
        ([float("inf"), 0.0, 0.0, 0.0], "not finite"),
    ],
)
def test_weights_that_are_none(g: object, said: str) -> None:
    with pytest.raises(BadParameter, match=said), on(several()).weighted(g):  # type: ignore[arg-type]
        pass


def test_rows_that_do_not_fit_the_batch() -> None:
    mixture = on(several())
    with pytest.raises(Incompatible, match="3 rows, and there are weights for 2"):
        run(mixture, torch.full((2, 4), 0.25))


def test_what_cannot_be_mixed() -> None:
    model = tiny_model("llama")
    before = everything(model)
    cases: list[tuple[dict[str, Adapter], dict[str, object], type[Exception], str]] = [
        ({"a": made(1, "dora")}, {}, NotExportable, "adapter 1: dora rescales W"),
        ({"a": made(1, r=2), "b": made(2, r=3)}, {"form": "factors"}, Incompatible, r"ranks \[2, 3\]"),
        ({"a": made(1, sites=["lm_head"])}, {}, Incompatible, "output head"),
        ({"a": made(1)}, {"form": "output"}, BadParameter, "Did you mean 'outputs'"),
        ({}, {}, BadParameter, "no adapter was given"),
    ]
    for adapters, options, error, said in cases:
        with pytest.raises(error, match=said):
            attach_mixture(model, adapters, **options)  # type: ignore[arg-type]
        assert all(same_bits(before[name], tensor) for name, tensor in everything(model).items())
        assert before.keys() == everything(model).keys()
    with pytest.raises(Incompatible, match="weights of a mixture"):
        attach_mixture(tiny_model("mixtral"), {"a": made(1, arch="mixtral", sites="experts")})


def test_another_base_is_refused_by_the_adapters_name() -> None:
    adapters = several()
    with pytest.raises(AdapterMismatch, match="a0: the adapter was trained on"):
        attach_mixture(tiny_model("llama", seed=3), adapters)
    assert attach_mixture(tiny_model("llama", seed=3), adapters, force=True).names == tuple(adapters)
    with pytest.raises(AdapterMismatch, match="a base of other shapes"):
        attach_mixture(tiny_model("llama", intermediate_size=48), adapters, force=True)


# ------------------------------------------------------------------------------------------------------------------------ the mutants
def test_a_scale_of_the_first_for_all_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the published retriever's code does."""
    real = module.stack
    monkeypatch.setattr(module, "stack", lambda *args: (*real(*args)[:2], real(*args)[2][:1].expand(len(real(*args)[2]))))
    with pytest.raises(AssertionError):
        test_all_weight_on_one_is_that_one("factors")


def test_one_weight_for_the_batch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.weights_in
    monkeypatch.setattr(module, "weights_in", lambda ctx, x, site: real(ctx, x, site).mean(0, keepdim=True))
    with pytest.raises(AssertionError):
        test_each_sample_has_its_own_weights_and_no_others("outputs")
