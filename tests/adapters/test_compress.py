"""ComPEFT: what its definition says, value by value, and what is written is what is read."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
from lorakit.adapters import sparse
from lorakit.adapters.compress import META, compress, compressed, entropy, largest, relative_error, report, trained
from lorakit.adapters.convert import convert
from lorakit.adapters.diagnose.distance import distance
from lorakit.adapters.digest import digest
from lorakit.adapters.drop import without_first
from lorakit.adapters.inspect import inspect_adapter
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import mix
from lorakit.adapters.weights import pack, read
from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach_adapter
from lorakit.core.method import get_method
from lorakit.core.site import Site
from tests.adapters.subject import in_peft, logits, shaken, tiny_model
from tests.laws.subject import same_bits, subject


def made(*, d: int = 40, r: int = 3, sites: int = 2, small: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    """A LoRA of random values at a few sites; B `small` times as large as A."""
    rng = torch.Generator().manual_seed(seed)
    where = tuple(Site(f"layers.{i}.q_proj", "linear", d, d + 8, i, "q") for i in range(sites))
    tensors = {}
    for site in where:
        tensors[f"{site.name}.A"] = torch.randn(r, d, generator=rng, dtype=torch.float64).to(dtype)
        tensors[f"{site.name}.B"] = small * torch.randn(d + 8, r, generator=rng, dtype=torch.float64).to(dtype)
    recipe = get_method("lora", r=r, sites=["q_proj"]).recipe
    return Adapter(recipe, where, tensors, {"metrics": {"loss": 1.5}, "task": "causal-lm"})


def flat(adapter: Adapter) -> torch.Tensor:
    return torch.cat([adapter.tensors[name].flatten() for name in sorted(adapter.tensors)])


def same(a: Adapter, b: Adapter) -> bool:
    alike = a.tensors.keys() == b.tensors.keys() and all(a.tensors[k].shape == b.tensors[k].shape for k in a.tensors)
    return alike and all(same_bits(a.tensors[k].reshape(-1), b.tensors[k].reshape(-1)) for k in a.tensors if a.tensors[k].numel())


# --------------------------------------------------------------------------------------------------------------- the definition
@pytest.mark.parametrize("alpha", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.29, 0.5, 1])
def test_one_size_three_values_and_as_many_as_density_says(density, alpha):
    """Acceptance 1, against the formula in numpy."""
    adapter = made(d=44, sites=2)  # D = 576: 0.29 · 576 = 167.04, and in floats 0.29 · 100 = 28.999…
    tau = flat(adapter).double().numpy()
    small = flat(compress(adapter, density=density, alpha=alpha, scope="adapter")).numpy()
    c = np.float32(alpha * tau.std(ddof=1))
    assert set(np.unique(small)) <= {-c, np.float32(0), c}
    n = math.floor(round(density * len(tau), 9))
    kept = np.argsort(-np.abs(tau), kind="stable")[:n]
    expected = np.zeros_like(small)
    expected[kept] = c * np.sign(tau[kept])
    assert np.count_nonzero(small) == n
    assert (small == expected).all()


def test_the_share_is_the_decimal_that_was_written():
    """0.29 · 100 is 28.999999999999996 in floats."""
    adapter = made(d=21, r=2, sites=1)  # 42 + 58 values
    assert int(flat(compress(adapter, density=0.29, scope="adapter")).count_nonzero()) == 29


@pytest.mark.parametrize("scope", ["adapter", "factor", "tensor"])
def test_each_scope_has_its_own_threshold_and_size(scope):
    adapter = made(small=0.01)
    result = compress(adapter, scope=scope)
    sides = {name: name[-1] if scope == "factor" else name if scope == "tensor" else "" for name in adapter.tensors}
    for side in set(sides.values()):
        old, new = (torch.cat([a.tensors[name].flatten() for name in sorted(sides) if sides[name] == side]) for a in (adapter, result))
        assert int(new.count_nonzero()) == math.floor(0.2 * len(old))
        sizes = new[new != 0].abs()
        torch.testing.assert_close(sizes, torch.full_like(sizes, float(old.double().std())), rtol=1e-6, atol=0)
        assert old[new != 0].abs().min() >= old[new == 0].abs().max()
        assert (old[new != 0].sign() == new[new != 0].sign()).all()


def test_one_threshold_for_all_loses_the_smaller_factor():
    """Why the paper's scope is not the default: with B a hundredth of A in size, nothing is left of the update."""
    adapter = made(small=0.01)
    assert relative_error(adapter, compress(adapter, scope="adapter")) == pytest.approx(1.0, abs=1e-12)
    assert relative_error(adapter, compress(adapter, scope="factor")) < 0.95
    assert same(compress(adapter), compress(adapter, scope="factor"))


@pytest.mark.parametrize("scope", ["adapter", "factor", "tensor"])
@pytest.mark.parametrize("keep", ["ternary", "mean", "magnitude"])
@given(seed=st.integers(0, 9), ties=st.booleans())
@settings(max_examples=8)
def test_compressing_again_keeps_the_same_values(scope, keep, seed, ties):
    """Acceptance 2: also where many values are equal."""
    adapter = made(d=12, seed=seed)
    if ties:
        adapter = dataclasses.replace(adapter, tensors={k: (2 * t).round() for k, t in adapter.tensors.items()})
    once = compress(adapter, scope=scope, keep=keep)
    twice = compress(once, scope=scope, keep=keep)
    assert all(torch.equal(once.tensors[k].sign(), twice.tensors[k].sign()) for k in once.tensors)
    assert keep != "magnitude" or same(once, twice)


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0]), min_size=1, max_size=30), st.data())
def test_of_equal_values_the_first_are_kept(values, data):
    n = data.draw(st.integers(1, len(values)))
    kept = largest(torch.tensor(values), n)
    best = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:n]
    assert kept.nonzero().flatten().tolist() == sorted(best)


def test_the_order_of_tensors_and_sites_is_nothing():
    adapter = dataclasses.replace(made(), tensors={k: t.round() for k, t in made().tensors.items()})
    other = dataclasses.replace(adapter, tensors=dict(reversed(adapter.tensors.items())), sites=adapter.sites[::-1])
    assert same(compress(adapter, scope="adapter"), compress(other, scope="adapter"))


def test_the_ablations():
    """Acceptance 4: pruning alone leaves the kept values as they are; STC gives them their mean size."""
    adapter = made()
    tau = flat(adapter)
    kept = largest(tau, math.floor(0.2 * len(tau)))
    pruned = flat(compress(adapter, scope="adapter", keep="magnitude"))
    assert same_bits(pruned, torch.where(kept, tau, 0.0))
    mean = flat(compress(adapter, scope="adapter", keep="mean"))
    torch.testing.assert_close(mean, torch.where(kept, tau.sign() * tau[kept].abs().mean(), 0.0))
    assert torch.equal(mean != 0, kept)
    doubled = flat(compress(adapter, scope="adapter", keep="magnitude", alpha=2.0))
    assert same_bits(doubled, 2 * pruned)


def test_all_kept_with_their_sizes_is_the_adapter_itself():
    adapter = made()
    assert same(compress(adapter, density=1.0, keep="magnitude"), adapter)
    assert relative_error(adapter, compress(adapter, density=1.0, keep="magnitude")) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_stay(dtype, tmp_path):
    adapter = made(dtype=dtype)
    result = compress(adapter, scope="tensor")
    for name, tensor in result.tensors.items():
        c = adapter.tensors[name].flatten().double().std().to(torch.promote_types(dtype, torch.float32)).to(dtype)
        assert tensor.dtype == dtype
        assert set(tensor.unique().tolist()) == {-c.item(), 0.0, c.item()}
    save_adapter(result, tmp_path, coded=True)
    assert same(load_adapter(tmp_path), result)


def test_nothing_given_is_changed():
    adapter = made()
    before = {k: t.clone() for k, t in adapter.tensors.items()}
    result = compress(adapter, density=0.1, alpha=2.0, scope="factor", keep="mean")
    assert all(same_bits(adapter.tensors[k], before[k]) for k in before)
    assert adapter.meta == {"metrics": {"loss": 1.5}, "task": "causal-lm"}
    how = {"density": 0.1, "alpha": 2.0, "scope": "factor", "keep": "mean"}
    assert result.meta == {"task": "causal-lm", META: how | {"sha256": digest(result.tensors)}}  # the loss was another adapter's
    assert compressed(result) == how
    assert compressed(adapter) is None


def test_what_became_of_a_compressed_adapter_is_not_called_compressed(tmp_path):
    """Its meta goes with it, so that meta alone proves nothing."""
    model = tiny_model("llama")
    small = compress(shaken(model, "lora", r=2, sites=["q_proj"]).state(), keep="mean")
    save_adapter(small, tmp_path / "small", coded=True)
    how = {"density": 0.2, "alpha": 1.0, "scope": "factor", "keep": "mean"}
    assert compressed(load_adapter(tmp_path / "small")) == compressed(load_adapter(tmp_path / "small", lazily=True)) == how
    adapted = lorakit.load(tiny_model("llama"), tmp_path / "small")
    assert compressed(adapted.state()) == how
    with torch.no_grad():
        next(iter(adapted.params())).tensor[0, 0].add_(1e-3)
    assert adapted.state().meta[META]["keep"] == "mean"
    assert compressed(adapted.state()) is None
    assert compressed(without_first(small, 1)) is None
    assert compressed(compress(small, density=0.1)) == how | {"density": 0.1, "keep": "ternary"}
    for some in ([small], [small, small]):
        mixture = mix(some)
        assert compressed(mixture) is None
        assert META not in mixture.meta
    for odd in ("yes", None, {}, {"sha256": 3}, [1]):
        assert compressed(dataclasses.replace(small, meta={META: odd})) is None


def test_a_mixture_has_no_metrics_of_its_ingredients():
    assert mix([made()], weights=[2.0]).meta.keys() == {"task", "mix"}


def test_a_site_without_rank_has_nothing_to_compress():
    """EVA may leave none."""
    state = dataclasses.replace(made(), recipe=get_method("eva", r=3, sites=["q_proj"]).recipe)
    none = state.sites[0].name
    tensors = state.tensors | {f"{none}.A": torch.zeros(0, 40), f"{none}.B": torch.zeros(48, 0)}
    state = dataclasses.replace(state, tensors=tensors)
    small = compress(state, scope="tensor", density=0.5)
    assert {k.rpartition(".")[0] for k in trained(state)} == {site.name for site in state.sites[1:]}
    assert small.tensors[f"{none}.B"].shape[1] == 0
    assert 0 < relative_error(state, small) < 1.5
    with pytest.raises(lorakit.NotExportable, match="eva has nothing to compress"):
        compress(dataclasses.replace(state, sites=state.sites[:1], tensors={k: t for k, t in tensors.items() if k.startswith(f"{none}.")}))


# ------------------------------------------------------------------------------------------------------- what is compressed, what not
TRAINED = {
    "lora": {"A", "B"},
    "lora_fa": {"B"},
    "dora": {"A", "B"},
    "vera": {"d", "b"},
    "lora_xs": {"R"},
    "fourierft": {"c"},
    "adalora": {"A", "B"},
    "krona": {"w1", "w2"},
    "bitfit": {"b"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_was_trained_at_sites_is_compressed_and_nothing_else(name):
    state = subject(name, unfreeze=("norm",)).state()
    result = compress(state, density=0.5)
    changed = {k for k in state.tensors if not same_bits(state.tensors[k], result.tensors[k])}
    assert changed == trained(state).keys()
    assert {k.rpartition(".")[2] for k in changed} == TRAINED[name]
    assert all(k.startswith(tuple(site.name for site in state.sites)) for k in changed)


@pytest.mark.parametrize("name", ["vb_lora", "compacter"])
def test_what_sites_share_is_compressed_if_it_was_trained(name):
    state = subject(name).state()
    changed = {k for k, t in compress(state, density=0.5).tensors.items() if not same_bits(t, state.tensors[k])}
    assert any(k.startswith("lora_shared.pool.") for k in changed)


def test_every_method_is_compressed_and_read_back_or_refused_with_the_reason(tmp_path):
    reasons = []
    for name in lorakit.list_methods():
        adapted = subject(name)
        state = adapted.state()
        try:
            small = compress(state, density=0.9)
        except lorakit.NotExportable as error:
            reasons.append((name, str(error)))
            continue
        save_adapter(small, tmp_path / name, coded=True)
        assert same(load_adapter(tmp_path / name), small), name
        assert relative_error(state, small) > 0, name
    assert {name for name, why in reasons if "subtracts its own start" in why} == {"pissa", "lora_ga", "delta_lora"}
    assert {name for name, why in reasons if "nothing to compress" in why} == {"flora_gc", "prefix", "prompt_tuning"}
    assert len(reasons) == 6


# ----------------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"density": 0.0}, "density=0.0; expected 0 < density <= 1"),
        ({"density": 1.5}, "density=1.5; expected"),
        ({"density": 20}, "density=20; expected .*0.2 for 20 %"),
        ({"density": -0.1}, "density=-0.1"),
        ({"density": float("nan")}, "density=nan"),
        ({"alpha": 0.0}, "alpha=0.0; expected a positive factor"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"scope": "layer"}, "scope='layer'; expected adapter, factor, tensor"),
        ({"keep": "sign"}, "keep='sign'; expected ternary, mean, magnitude"),
        (
            {"density": 0.001},
            r"density=0.001 keeps none of the 240 values of 2 tensors \(layers.0.q_proj.A, …\): take more, or a wider scope",
        ),
        ({"density": 0.001, "scope": "tensor"}, "none of the 120 values of layers.0.q_proj.A: take"),
        ({"density": 0.001, "scope": "factor"}, r"none of the 240 values of 2 tensors \(layers.0.q_proj.A, …\)"),
        ({"alpha": 1e39}, "alpha=1e\\+39 makes the kept values .* no number for their dtype"),
        ({"alpha": 1e-60}, "no number for their dtype"),
    ],
)
def test_impossible_settings(kwargs, message):
    with pytest.raises(lorakit.BadParameter, match=message):
        compress(made(), **kwargs)


def test_values_that_are_all_equal_have_no_deviation():
    adapter = dataclasses.replace(made(), tensors={k: torch.ones_like(t) for k, t in made().tensors.items()})
    with pytest.raises(lorakit.BadParameter, match=r"makes the kept values of layers.0.q_proj.A 0, .* keep mean"):
        compress(adapter, scope="tensor")
    assert set(flat(compress(adapter, keep="mean")).tolist()) == {0.0, 1.0}
    one = dataclasses.replace(adapter, tensors={k: t if k.endswith("A") else t.new_zeros(t.shape) for k, t in adapter.tensors.items()})
    assert not any(t.any() for k, t in compress(one, keep="mean").tensors.items() if k.endswith("B"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value):
    adapter = made()
    adapter.tensors["layers.1.q_proj.B"][3, 1] = value
    with pytest.raises(lorakit.AdapterMismatch, match=r"tensor layers.1.q_proj.B holds NaN or infinite values"):
        compress(adapter)


def test_an_adapter_without_trained_values_at_sites():
    state = subject("prompt_tuning").state()
    with pytest.raises(lorakit.NotExportable, match="prompt_tuning has nothing to compress"):
        compress(state)
    whole = shaken(tiny_model("llama"), "lora", r=2, sites=["q_proj"], unfreeze=("norm",)).state()
    only = Adapter(whole.recipe, (), whole.tensors | {}, {})
    only = dataclasses.replace(only, tensors={k: v for k, v in only.tensors.items() if k.startswith("unfrozen.")})
    with pytest.raises(lorakit.NotExportable, match="lora has nothing to compress"):
        compress(only)


def test_a_start_that_is_subtracted_is_refused_with_the_way_out(tmp_path):
    model = tiny_model("llama")
    shaken(model, "pissa", r=2, sites=["q_proj"]).save(tmp_path / "pissa")
    with pytest.raises(lorakit.NotExportable, match=r"pissa subtracts its own start at 2 sites .*lorakit mix ADAPTER --weights 1"):
        compress(load_adapter(tmp_path / "pissa"))
    plain = mix([load_adapter(tmp_path / "pissa")], weights=[1.0], space="delta+svd:4")
    assert relative_error(plain, compress(plain, keep="mean", density=0.5)) < 0.9


# ------------------------------------------------------------------------------------------------------------------------ the error
@pytest.mark.parametrize(
    ("name", "arch"), [("lora", "llama"), ("rslora", "gpt2"), ("vera", "llama"), ("fourierft", "llama"), ("dora", "llama")]
)
def test_the_relative_error_is_that_of_the_dense_updates(name, arch):
    state = subject(name, arch).state()
    small = compress(state, density=0.5)
    old, new = ([delta.weight().double() for delta in a.deltas().values()] for a in (state, small))
    dense = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(old, new, strict=True)) / sum(a.square().sum().item() for a in old))
    assert relative_error(state, small) == pytest.approx(dense, rel=1e-5)
    assert dense > 0.01


def test_no_dense_update_is_formed_where_there_are_factors(monkeypatch):
    state = subject("lora").state()
    small = compress(state)
    monkeypatch.setattr("lorakit.core.lowrank.LowRank.weight", lambda self: pytest.fail("a dense update"))
    relative_error(state, small)


def test_the_error_of_modules_is_that_of_their_tensors():
    state = subject("adapter_houlsby").state()
    small = compress(state)
    names = [k for k in state.tensors if k.startswith(tuple(site.name for site in state.sites))]
    old, new = (torch.cat([a.tensors[k].flatten() for k in names]).double() for a in (state, small))
    assert relative_error(state, small) == pytest.approx(((old - new).norm() / old.norm()).item(), rel=1e-5)


def test_the_error_of_stacks_of_experts():
    adapted = lorakit.attach(tiny_model("qwen3_moe"), lorakit.get_method("lora", r=2, sites=["experts"]))
    for row in adapted.params():
        torch.nn.init.normal_(row.tensor, generator=torch.Generator().manual_seed(len(row.name)))
    state = adapted.state()
    small = compress(state)
    old, new = ([f.s * f.B.double() @ f.A.double() for f in a.factors(stacks=True).values()] for a in (state, small))
    dense = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(old, new, strict=True)) / sum(a.square().sum().item() for a in old))
    assert relative_error(state, small) == pytest.approx(dense, rel=1e-6)


def test_an_adapter_that_changes_nothing_has_no_error():
    state = lorakit.attach(tiny_model("llama"), lorakit.get_method("lora", sites=["q_proj"])).state()
    assert relative_error(state, compress(state)) == 0.0


def test_the_entropy():
    """The catalogue's figures: 0.336 bit at 5 %, 0.92 at 20 %."""
    assert entropy(0.05) == pytest.approx(0.336, abs=5e-4)
    assert entropy(0.2) == pytest.approx(0.922, abs=5e-4)
    assert entropy(2 / 3) == pytest.approx(math.log2(3))
    assert (entropy(0.0), entropy(1.0), entropy(1.0, 32)) == (0.0, 1.0, 32.0)


# ------------------------------------------------------------------------------------------------------------------------- on disk
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("scope", ["adapter", "tensor"])
def test_the_file_is_close_to_the_entropy(density, scope, tmp_path):
    """Acceptance 3. Adapter-wide, A and B differ in density and that saves bits: so there is no lower bound there."""
    adapter = made(d=4000, r=16, sites=4, small=0.7)
    result = compress(adapter, density=density, scope=scope)
    save_adapter(result, tmp_path, coded=True)
    found = report(adapter, result, tmp_path)
    D = flat(adapter).numel()
    assert (found.values, found.kept) == (D, sum(math.floor(density * n) for n in ([D] if scope == "adapter" else [64_000, 64_128] * 4)))
    assert found.tensor_bytes == 4 * D
    assert found.entropy == pytest.approx(entropy(density), rel=1e-3)
    assert found.bits < 1.01 * found.entropy
    assert scope == "adapter" or found.bits > 0.999 * found.entropy
    header = 1000  # one safetensors header and the index of 8 tensors
    assert found.file_bytes == (tmp_path / "adapter.safetensors").stat().st_size
    assert found.file_bytes < found.bits * D / 8 + header <= 2 * D / 8 + header
    assert found.error == relative_error(adapter, result)


def test_the_report_of_pruning_counts_whole_numbers(tmp_path):
    adapter = made(d=300, r=8)
    result = compress(adapter, keep="magnitude")
    save_adapter(result, tmp_path, coded=True)
    found = report(adapter, result, tmp_path)
    assert found.entropy == pytest.approx(entropy(0.2, 32), rel=1e-3)
    assert 0.999 < found.bits / found.entropy < 1.01
    assert report(adapter, dataclasses.replace(result, meta={}), tmp_path) == found


def test_sites_that_lost_their_update_are_listed(tmp_path):
    """As LoRA's A starts: uniform up to 1/√d_in, so that the top fifth of all lies beyond what a site of larger d_in has."""
    adapter, rng = made(sites=3), torch.Generator().manual_seed(0)
    for i, bound in enumerate((1.0, 0.5, 1.0)):
        adapter.tensors[f"layers.{i}.q_proj.A"].uniform_(-bound, bound, generator=rng)
    adapter.tensors["layers.2.q_proj.B"].zero_()  # none to lose
    for scope, lost in (("factor", ["layers.1.q_proj"]), ("tensor", [])):
        result = compress(adapter, scope=scope)
        save_adapter(result, tmp_path / scope, coded=True)
        found = report(adapter, result, tmp_path / scope)
        assert (found.lost, found.sites) == (lost, 3)
    once = compress(adapter)
    save_adapter(compress(once), tmp_path / "again", coded=True)
    assert report(once, compress(once), tmp_path / "again").lost == []


@pytest.mark.parametrize(("arch", "kwargs"), [("llama", {"unfreeze": ("norm",)}), ("gpt2", {"sites": ["c_attn[q]", "c_fc", "wte"]})])
@pytest.mark.parametrize("keep", ["ternary", "magnitude"])
def test_what_is_written_is_read_bit_by_bit(arch, kwargs, keep, tmp_path):
    adapted = shaken(tiny_model(arch), "lora", **kwargs)
    small = compress(adapted.state(), keep=keep)
    save_adapter(small, tmp_path / "coded", coded=True)
    save_adapter(small, tmp_path / "plain")
    read_back = load_adapter(tmp_path / "coded")
    assert same(read_back, small)
    assert same(load_adapter(tmp_path / "coded", lazily=True), small)
    assert (read_back.recipe, read_back.sites, read_back.meta) == (small.recipe, small.sites, small.meta)
    assert (tmp_path / "coded" / "adapter.json").read_bytes() == (tmp_path / "plain" / "adapter.json").read_bytes()
    save_adapter(read_back, tmp_path / "again", coded=True)
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (tmp_path / "coded" / "adapter.safetensors").read_bytes()
    for folder in ("coded", "plain"):
        loaded = lorakit.load(tiny_model(arch), tmp_path / folder)
        assert torch.equal(logits(loaded.model), logits(attach_adapter(tiny_model(arch), small).model))


def test_a_compressed_folder_is_an_adapter_like_any_other(tmp_path):
    """Inspected, converted to PEFT and to plain files, merged, trained on and saved plainly."""
    model = tiny_model("llama")
    small = compress(shaken(model, "lora", r=2, sites=["q_proj", "down_proj"]).state(), density=0.5)
    save_adapter(small, tmp_path / "coded", coded=True)
    seen = inspect_adapter(load_adapter(tmp_path / "coded"), folder=tmp_path / "coded")
    assert seen.as_dict()["sites"] == inspect_adapter(small).as_dict()["sites"]
    convert(tmp_path / "coded", tmp_path / "plain", to="lorakit")
    assert read(tmp_path / "plain" / "adapter.safetensors").keys() == small.tensors.keys()
    convert(tmp_path / "coded", tmp_path / "peft")
    expected = logits(attach_adapter(tiny_model("llama"), small).model)
    torch.testing.assert_close(logits(in_peft(tiny_model("llama"), tmp_path / "peft")), expected)
    adapted = lorakit.load(tiny_model("llama"), tmp_path / "coded")
    adapted.merge()
    torch.testing.assert_close(logits(adapted.model), expected)
    adapted.unmerge()
    with torch.no_grad():
        next(iter(adapted.params())).tensor.add_(1)
    adapted.save(tmp_path / "coded")
    assert read(tmp_path / "coded" / "adapter.safetensors").keys() == small.tensors.keys()
    assert same(load_adapter(tmp_path / "coded"), adapted.state())


def test_compressed_adapters_are_mixed_and_compared_as_plain_ones(tmp_path):
    """Read lazily, as `lorakit mix` and `lorakit distance` do."""
    some = [compress(shaken(tiny_model("llama"), "lora", seed=i, r=2).state(), density=0.4) for i in (1, 2)]
    for i, small in enumerate(some):
        save_adapter(small, tmp_path / f"coded{i}", coded=True)
        save_adapter(small, tmp_path / f"plain{i}")
    coded, plain = ([load_adapter(tmp_path / f"{kind}{i}", lazily=True) for i in range(2)] for kind in ("coded", "plain"))
    for how in ("linear", "ties"):
        one, other = (mix(few, how, weights=[0.7, 0.3]) for few in (coded, plain))
        assert same(one, other)
        assert one.meta == other.meta
    assert distance(dict(zip("ab", coded, strict=True))).as_dict() == distance(dict(zip("ab", some, strict=True))).as_dict()
    assert torch.equal(
        logits(attach_adapter(tiny_model("llama"), coded[0]).model), logits(attach_adapter(tiny_model("llama"), some[0]).model)
    )


@pytest.mark.parametrize("coded", [False, True])
def test_an_adapter_that_is_read_lazily_is_compressed_into_its_own_folder(coded, tmp_path):
    adapter = shaken(tiny_model("llama"), "lora", r=2, unfreeze=("norm",)).state()
    save_adapter(adapter, tmp_path / "a", coded=coded)
    expected = compress(adapter, keep="mean")
    result = compress(load_adapter(tmp_path / "a", lazily=True), keep="mean")
    assert same(result, expected)
    assert result.meta == expected.meta
    assert relative_error(load_adapter(tmp_path / "a", lazily=True), result) == relative_error(adapter, expected)
    save_adapter(result, tmp_path / "a", coded=True)
    assert same(load_adapter(tmp_path / "a"), expected)


def test_a_damaged_file_is_refused_by_every_door(tmp_path):
    save_adapter(compress(shaken(tiny_model("llama"), "lora", r=2, sites=["q_proj"]).state()), tmp_path, coded=True)
    path = tmp_path / "adapter.safetensors"
    whole = path.read_bytes()
    for damage in (whole[:-1], whole[: len(whole) // 2], whole[:-20] + bytes([whole[-20] ^ 16]) + whole[-19:]):
        path.write_bytes(damage)
        with pytest.raises(lorakit.CheckpointError, match="adapter.safetensors is damaged or cut off"):
            load_adapter(tmp_path)
        with pytest.raises(lorakit.CheckpointError, match="is damaged or cut off"):
            lorakit.load(tiny_model("llama"), tmp_path)


def test_coded_tensors_of_another_recipe_are_refused(tmp_path):
    """The checksum seals a file, not what belongs into it."""
    save_adapter(compress(shaken(tiny_model("llama"), "lora", r=2, sites=["q_proj"]).state()), tmp_path, coded=True)
    (tmp_path / "adapter.safetensors").write_bytes(pack(sparse.encode({"x.A": torch.ones(2, 2)})))
    with pytest.raises(lorakit.AdapterMismatch, match="missing"):
        load_adapter(tmp_path)
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert record["meta"][META]["keep"] == "ternary"
