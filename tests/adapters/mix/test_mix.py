"""`mix` on adapters of real models: methods, ranks, sites, provenance, and what it refuses."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import mix
from lorakit.core.errors import AdapterMismatch, BadParameter, Incompatible, NotExportable
from tests.adapters.mix.values import adapter, close, dense, pair, weight
from tests.adapters.subject import in_peft, logits, shaken, tiny_model

METHODS = [
    ("lora", {"r": 2}),
    ("rslora", {"r": 4, "alpha": 8.0}),
    ("lora", {"r": 2, "rank_pattern": {"layers.0.*q_proj": 3}, "alpha_pattern": {"v_proj": 5.0}, "sites": "attention"}),
    ("pissa", {"r": 2}),
    ("adalora", {"r": 4, "target_r": 2}),
    ("vera", {"r": 4}),
    ("lora_xs", {"r": 2}),
]


def changes(one: lorakit.Adapter) -> dict[str, torch.Tensor]:
    return {name: delta.weight().double() for name, delta in one.deltas().items()}


def test_adapters_of_any_method_and_rank_add_up() -> None:
    some = [shaken(tiny_model("llama"), name, seed=i, **options).state() for i, (name, options) in enumerate(METHODS)]
    weights = [0.9, -0.4, 1.0, 0.3, 0.2, 0.7, 1.1]
    mixed = mix(some, weights=weights)
    found = changes(mixed)
    for name in found:
        parts = [w * changes(one)[name] for one, w in zip(some, weights, strict=True) if name in changes(one)]
        assert close(found[name], sum(parts[1:], parts[0]), 1e-5), name
    assert set(found) == {site.name for one in some for site in one.sites}
    assert mixed.meta["base"] == some[0].meta["base"]


def test_stacks_of_experts_are_mixed_one_by_one() -> None:
    some = [shaken(tiny_model("mixtral"), "lora", seed=i, r=2, sites="experts").state() for i in (1, 2)]
    mixed, wanted = changes(mix(some, weights=[0.7, 0.3])), [changes(one) for one in some]
    assert all(close(W, 0.7 * wanted[0][name] + 0.3 * wanted[1][name], 1e-5) for name, W in mixed.items())
    pruned = mix(some, "ties", density=0.5)
    assert all(torch.isfinite(t).all() for t in pruned.tensors.values())


def test_the_result_is_an_ordinary_adapter(tmp_path: Path) -> None:
    """Saved, loaded, attached, and the same in PEFT; merged in tests/serve/test_statistics.py."""
    from lorakit.adapters.peft_write import to_peft

    some = [shaken(tiny_model("llama"), "lora", seed=i, r=2 + i).state() for i in range(2)]
    mixed = mix(some, "ties", density=0.5)
    save_adapter(mixed, tmp_path / "mixed")
    again = load_adapter(tmp_path / "mixed")
    assert again.meta["mix"] == mixed.meta["mix"]
    attached = tiny_model("llama")
    lorakit.load(attached, tmp_path / "mixed")
    to_peft(again, tmp_path / "peft")
    assert torch.allclose(logits(in_peft(tiny_model("llama"), tmp_path / "peft")), logits(attached), atol=1e-5)


def test_weights_by_site() -> None:
    some = [adapter(pair(1), pair(2)), adapter(pair(3), pair(4))]
    mixed = mix(some, weights=[{"layers.0.q_proj": 2.0, "default": 0.5}, 1.0])
    assert close(weight(mixed, 0), 2 * dense(pair(1)) + dense(pair(3)))
    assert close(weight(mixed, 1), 0.5 * dense(pair(2)) + dense(pair(4)))
    assert mixed.meta["mix"]["weights"] == [{"layers.0.q_proj": 2.0, "default": 0.5}, 1.0]
    with pytest.raises(BadParameter, match="pattern 'k_proj' matches the name of none of the 2 adapted sites"):
        mix(some, weights=[{"k_proj": 1.0}, 1.0])


def test_what_it_was_made_of_is_kept() -> None:
    one, other = adapter(pair(1)), adapter(pair(2))
    mixed = mix([mix([one, other]), other], "ties", weights=[1.0, 0.5], density=0.5, seed=7)
    record = mixed.meta["mix"]
    assert (record["how"], record["weights"], record["seed"], record["options"]["density"]) == ("ties", [1.0, 0.5], 7, 0.5)
    assert record["sources"][0]["mix"]["how"] == "linear"
    assert record["sources"][1]["sha256"] == mix([other]).meta["mix"]["sources"][0]["sha256"]
    assert record["sources"][0]["sha256"] != record["sources"][1]["sha256"]
    assert 0 < record["lost"]["total"] < 1


def test_a_rank_wider_than_the_matrix_is_cut_to_it_without_loss() -> None:
    some = [pair(i, 4, d_out=6, d_in=5) for i in range(3)]
    mixed = mix([adapter(f) for f in some])
    assert len(mixed.factors()["layers.0.q_proj"].A) == 5
    assert close(weight(mixed), sum(dense(f) for f in some) / 3)  # type: ignore[arg-type]


def test_nothing_is_left_of_zeros() -> None:
    zero = pair(1)._replace(B=torch.zeros(12, 3))
    for space in ("delta", "core", "knots"):
        mixed = mix([adapter(zero), adapter(zero)], "ties", space=space, density=0.5)
        assert float(weight(mixed).norm()) == 0


def test_the_sources_are_left_as_they_were() -> None:
    one = adapter(pair(1))
    before = {key: t.clone() for key, t in one.tensors.items()}
    mix([one, adapter(pair(2))], "ties")
    assert all(torch.equal(before[key], t) for key, t in one.tensors.items())


# ------------------------------------------------------------------------------------------------------------------------ errors
def base(name: str, digest: str) -> dict[str, object]:
    return {"base": {"name": name, "checkpoint": digest, "rows": None}}


def test_other_bases_are_refused_by_both_names() -> None:
    some = [adapter(pair(1), meta=base("llama", "a" * 32)), adapter(pair(2), meta=base("qwen", "b" * 32))]
    with pytest.raises(AdapterMismatch, match=r"adapter 1 was made for llama \(aaaaaaaaaaaa\) and adapter 2 for qwen \(bbbbbbbbbbbb\)"):
        mix(some)
    assert "base" not in mix(some, force=True).meta


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(AdapterMismatch, match=r"layers.0.q_proj is linear of 12 × 10 for adapter 1 and linear of 9 × 10 for adapter 2"):
        mix([adapter(pair(1)), adapter(pair(2, d_out=9))])


def test_adapters_without_a_common_site_are_refused() -> None:
    one = shaken(tiny_model("llama"), "lora", r=2, sites="attention").state()
    other = shaken(tiny_model("llama"), "lora", r=2, sites="mlp").state()
    with pytest.raises(AdapterMismatch, match="adapter 1 has no site in common with the others"):
        mix([one, other])
    assert len(mix([one, other], force=True).sites) == len(one.sites) + len(other.sites)


def test_numbers_that_are_none() -> None:
    broken = pair(1)
    broken.A[0, 0] = math.nan
    with pytest.raises(AdapterMismatch, match="adapter 2 holds NaN or infinite values at layers.0.q_proj"):
        mix([adapter(pair(2)), adapter(broken)])


@pytest.mark.parametrize(
    ("name", "why"),
    [("dora", "rescales W itself"), ("prefix", "is more than a change of weights"), ("compacter", "is more than|no factors")],
)
def test_what_has_no_factors_is_refused_with_what_would_help(name: str, why: str) -> None:
    one = shaken(tiny_model("llama"), name).state()
    with pytest.raises(NotExportable, match=f"adapter 1.*{why}.*--svd-rank"):
        mix([one, one])


def test_weights_trained_whole_are_refused() -> None:
    one = shaken(tiny_model("llama"), "lora", r=2, unfreeze=("lm_head",)).state()
    with pytest.raises(Incompatible, match="adapter 1 also trained 1 parameters whole"):
        mix([one])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "tie"}, "no mixer is called 'tie'. Did you mean 'ties'"),
        ({"how": "ties", "denisty": 0.2}, "ties has no option 'denisty'. Did you mean 'density'"),
        ({"how": "ties", "density": 0.0}, r"ties: density=0.0: expected more than 0"),
        ({"how": "ties", "density": 1.5}, r"ties: density=1.5: expected at most 1"),
        ({"how": "svd", "rank": -1}, r"svd: rank=-1"),
        ({"seed": 2**63}, r"seed=9223372036854775808; expected a number from 0 to 2\*\*63 - 1"),
        ({"seed": -1}, "seed=-1; expected"),
        ({"weights": [1.0]}, "1 weights for 2 adapters; expected one each"),
        ({"weights": [1.0, math.inf]}, "weight inf is not a finite number"),
        ({"weights": [1.0, "a"]}, "weight 'a' is not a finite number"),
        ({"space": "weights"}, "no space is called 'weights'. Known: core, delta, factor, factor:both, factor:pem, knots"),
        ({"space": "delta+svd:0"}, r"expected \+svd:Q with a rank Q of at least 1, as in delta\+svd:16"),
    ],
)
def test_what_was_typed_wrong(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        mix([adapter(pair(1)), adapter(pair(2))], **arguments)  # type: ignore[arg-type]


def test_no_adapter_at_all() -> None:
    with pytest.raises(BadParameter, match="no adapter was given"):
        mix([])


def test_adapters_that_change_nothing() -> None:
    with pytest.raises(BadParameter, match="the adapters change no weight at any site"):
        mix([dataclasses.replace(adapter(pair(1)), sites=(), tensors={})])
