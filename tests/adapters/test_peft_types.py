"""PEFT's own types of the methods that share tensors or are no s·B·A: both directions, against the real PEFT."""

import copy
import dataclasses
import json
import warnings

import peft
import pytest
import safetensors.torch
import torch

import lorakit
from lorakit.adapters.compact import compact
from lorakit.adapters.convert import convert
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.peft import from_peft, to_peft
from lorakit.adapters.peft_types import TYPES
from tests.adapters.subject import in_peft, logits, made_by_peft, quiet, save_by_peft, shaken, tiny_model
from tests.laws.subject import same_bits

SMALL = {
    "vera": {"r": 4},
    "vb_lora": {"num_vectors": 12, "vector_length": 8},
    "fourierft": {"n_frequency": 20, "scaling": 30.0},
    "krona": {},
}
TYPE = {"vera": "VERA", "vb_lora": "VBLORA", "fourierft": "FOURIERFT", "krona": "LOKR"}


def made(name, arch="llama", *, model=None, **kwargs):
    """(an untouched base, the model with the adapter attached)."""
    base = tiny_model(arch, **(model or {}))
    return copy.deepcopy(base), shaken(base, name, **{**SMALL[name], **kwargs})


def same(one, other):
    assert (one.recipe, one.sites, one.meta) == (other.recipe, other.sites, other.meta)
    assert one.tensors.keys() == other.tensors.keys()
    return all(same_bits(one.tensors[k], v) for k, v in other.tensors.items())


def config_of(folder):
    """The configuration, its sets as sets."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v) if isinstance(v, list) and k in ("target_modules", "exclude_modules") else v for k, v in config.items()}


def weights_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def case(name, arch="llama", model=None, **kwargs):
    return pytest.param(name, arch, model, kwargs, id="-".join([name, arch, *map(str, (model or {}).values()), *kwargs]))


# ------------------------------------------------------------------------------------------------------------------------- ours
OURS = [
    *[case(name, arch) for name in SMALL for arch in ("llama", "gpt_neox", "qwen3")],
    *[case(name, "gpt2") for name in ("vera", "vb_lora", "fourierft")],
    *[case(name, model={"task": "sequence-classification"}, unfreeze=("score",)) for name in SMALL],
    *[case(name, sites=["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]) for name in SMALL],
    *[case(name, model={"attention_bias": True}, sites="q_proj", unfreeze=("q_proj.bias", "norm")) for name in ("vera", "vb_lora")],
    case("vera", save_projection=False, projection_prng_key=7),
    case("vera", r=48, d_initial=0.3),  # a rank beyond every matrix
    case("vb_lora", topk=1),
    case("vb_lora", topk=12),
    case("fourierft", n_frequency_pattern={"q_proj": 7, r"layers\.1\..*": 9}, init="zero", entry_seed=5),
    case("fourierft", n_frequency_pattern={"layers.0.mlp.up_proj|layers.1.mlp.up_proj": 7}),  # which PEFT would read otherwise
    case("krona", factor_out=4, factor_in=4, scaling=0.3),
]


@pytest.mark.parametrize(("name", "arch", "overrides", "kwargs"), OURS)
def test_peft_computes_the_same_and_the_folder_reads_back_as_the_same_adapter(name, arch, overrides, kwargs, tmp_path):
    base, adapted = made(name, arch, model=overrides, **kwargs)
    adapter, ours = adapted.state(), logits(adapted.model)
    task = "SEQ_CLS" if kwargs.get("unfreeze") == ("score",) else None
    result = to_peft(adapter, tmp_path / "peft", model=adapted.model, task_type=task)
    assert (result.peft_type, result.errors) == (TYPE[name], {})
    torch.testing.assert_close(logits(in_peft(base, tmp_path / "peft")), ours, atol=1e-5, rtol=1e-5)
    assert (ours - logits(base)).abs().max() > 1e-3, "or the agreement says nothing"
    assert same(load_adapter(tmp_path / "peft", model=base), adapter)
    loaded = lorakit.load(base, tmp_path / "peft")
    assert torch.equal(logits(loaded.model), ours)


@pytest.mark.parametrize(("name", "arch", "overrides", "kwargs"), [p for p in OURS if p.values[0] in ("vera", "vb_lora", "krona")])
def test_the_plain_form_is_exact(name, arch, overrides, kwargs, tmp_path):
    base, adapted = made(name, arch, model=overrides, **kwargs)
    task = "SEQ_CLS" if kwargs.get("unfreeze") == ("score",) else None
    result = to_peft(adapted.state(), tmp_path, native=False, model=adapted.model, task_type=task)
    assert (result.peft_type, result.errors) == ("LORA", {})
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), logits(adapted.model), atol=1e-5, rtol=1e-5)
    back = load_adapter(tmp_path, model=base)
    assert back.recipe.name == "lora"
    torch.testing.assert_close(logits(lorakit.load(base, tmp_path).model), logits(adapted.model), atol=1e-5, rtol=1e-5)


def test_fourierft_as_plain_lora_is_an_approximation_with_its_error(tmp_path):
    base, adapted = made("fourierft", sites=["q_proj"], n_frequency=2)
    with pytest.raises(lorakit.NotExportable, match=r"fourierft has no factors.*svd_rank"):
        to_peft(adapted.state(), tmp_path / "a", native=False)
    coarse = to_peft(adapted.state(), tmp_path / "1", native=False, svd_rank=1)
    exact = to_peft(adapted.state(), tmp_path / "4", native=False, svd_rank=4)  # two waves
    assert coarse.total > 0.1
    assert exact.total < 1e-5
    torch.testing.assert_close(logits(in_peft(base, tmp_path / "4")), logits(adapted.model), atol=1e-5, rtol=1e-5)


OTHERWISE = [
    case("vera", "gpt2", sites=["c_attn[q]", "c_attn[v]"]),
    case("vera", sites=["q_proj", "embedding"]),
    case("vb_lora", sites=["q_proj", "embedding"]),
    case("krona", "gpt2"),
    case("krona", sites=["q_proj", "embedding"]),
    case("krona", factor_out=4, factor_in=8),
]


@pytest.mark.parametrize(("name", "arch", "overrides", "kwargs"), OTHERWISE)
def test_what_the_type_cannot_hold_is_written_as_plain_lora(name, arch, overrides, kwargs, tmp_path):
    base, adapted = made(name, arch, model=overrides, **kwargs)
    result = to_peft(adapted.state(), tmp_path, model=adapted.model)
    assert (result.peft_type, result.errors) == ("LORA", {})
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), logits(adapted.model), atol=1e-5, rtol=1e-5)


def test_the_check_above_can_fail(tmp_path):
    """One wrong digit in a file, or one field, is seen."""
    for name, key, field, value in (
        ("vera", "vera_lambda_d", "projection_prng_key", 1),
        ("vb_lora", "vblora_logits_A", "topk", 3),
        ("fourierft", "fourierft_spectrum", "scaling", 30.1),
        ("krona", "lokr_w1", "alpha", 33),
    ):
        base, adapted = made(name, **({"save_projection": False} if name == "vera" else {}))
        want = logits(adapted.model)
        folder = tmp_path / name
        to_peft(adapted.state(), folder, model=adapted.model)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
        assert (logits(in_peft(base, folder)) - want).abs().max() > 1e-5, name
        assert (logits(lorakit.load(copy.deepcopy(base), folder).model) - want).abs().max() > 1e-5, name
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = safetensors.torch.load(weights_of(folder))
        changed = next(k for k in tensors if k.endswith(key))
        tensors[changed].view(-1)[0] += 5
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        assert (logits(in_peft(base, folder)) - want).abs().max() > 1e-6, name


# ------------------------------------------------------------------------------------------------------------------------ PEFT's
def theirs(label, config, arch="llama", *, recipe, **model):
    return pytest.param(arch, model, config, recipe, id=label)


Mismatch = lorakit.AdapterMismatch
V, B, F, K = peft.VeraConfig, peft.VBLoRAConfig, peft.FourierFTConfig, peft.LoKrConfig
BANK = {"num_vectors": 12, "vector_length": 8}
ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]
THEIRS = [
    theirs("vera", lambda: V(r=4, target_modules=ALL), recipe="vera"),
    theirs("vera all-linear", lambda: V(r=4, target_modules="all-linear", vera_dropout=0.1), recipe="vera"),
    theirs("vera default rank", lambda: V(target_modules=["q_proj"], d_initial=0.2), recipe="vera"),
    theirs("vera drawn again", lambda: V(r=4, target_modules=ALL, save_projection=False, projection_prng_key=3), recipe="vera"),
    theirs("vera layers", lambda: V(r=4, target_modules=ALL, layers_to_transform=[1], layers_pattern="layers"), recipe="vera"),
    theirs("vera gpt2", lambda: V(r=4, target_modules=["c_attn", "c_fc"]), "gpt2", recipe="vera"),
    theirs("vera biases", lambda: V(r=4, target_modules=["q_proj"], bias="vera_only"), recipe="vera", attention_bias=True),
    theirs("vera all biases", lambda: V(r=4, target_modules=["q_proj"], bias="all"), recipe="vera", attention_bias=True),
    theirs(
        "vera classifier", lambda: V(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"), recipe="vera", task="sequence-classification"
    ),
    theirs("vb_lora", lambda: B(target_modules=ALL, **BANK), recipe="vb_lora"),
    theirs("vb_lora choice", lambda: B(target_modules=ALL, topk=3, save_only_topk_weights=True, **BANK), recipe="vb_lora"),
    theirs("vb_lora choice of one", lambda: B(target_modules=ALL, topk=1, save_only_topk_weights=True, **BANK), recipe="vb_lora"),
    theirs(
        "vb_lora large bank",
        lambda: B(target_modules=["q_proj"], num_vectors=300, vector_length=8, save_only_topk_weights=True),
        recipe="vb_lora",
    ),
    theirs("vb_lora gpt2", lambda: B(target_modules=["c_attn"], vblora_dropout=0.1, **BANK), "gpt2", recipe="vb_lora"),
    theirs("vb_lora biases", lambda: B(target_modules=["q_proj"], bias="vblora_only", **BANK), recipe="vb_lora", attention_bias=True),
    theirs("fourierft", lambda: F(n_frequency=20, target_modules=ALL), recipe="fourierft"),
    theirs("fourierft zero", lambda: F(n_frequency=20, scaling=50, target_modules=["q_proj"], init_weights=True), recipe="fourierft"),
    theirs(
        "fourierft patterns",
        lambda: F(n_frequency=20, target_modules=ALL, n_frequency_pattern={"q_proj": 5, "layers.1.mlp.up_proj": 9, "nowhere": 3}),
        recipe="fourierft",
    ),
    theirs(
        "fourierft a whole name",
        lambda: F(n_frequency=20, target_modules=["q_proj"], n_frequency_pattern={"model.layers.1.self_attn.q_proj": 9}),
        recipe="fourierft",
    ),
    theirs("fourierft gpt2", lambda: F(n_frequency=20, target_modules=["c_attn"], random_loc_seed=3), "gpt2", recipe="fourierft"),
    theirs("lokr", lambda: K(r=32, alpha=32, target_modules=ALL), recipe="krona"),
    theirs("lokr factor", lambda: K(r=64, alpha=16, decompose_factor=4, target_modules=ALL), recipe="krona"),
    theirs("lokr lycoris", lambda: K(r=32, target_modules=["q_proj"], init_weights="lycoris", module_dropout=0.1), recipe="krona"),
    theirs(
        "lokr patterns",
        lambda: K(r=32, alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 64}, alpha_pattern={"up_proj": 16}),
        recipe="krona",
    ),
    theirs("lokr saved", lambda: K(r=32, target_modules=["q_proj"], modules_to_save=["lm_head"]), recipe="krona"),
]


def filled(model, config, folder):
    """PEFT's adapter with larger random tensors, so that no two logits are nearly tied and every factor counts."""
    with warnings.catch_warnings(action="ignore"):  # one of them is of making a configuration
        return made_by_peft(model, config(), folder)


@pytest.mark.parametrize(("arch", "overrides", "config", "recipe"), THEIRS)
def test_the_same_logits_and_the_same_files(arch, overrides, config, recipe, tmp_path):
    model = tiny_model(arch, **overrides)
    reference = logits(filled(model, config, tmp_path / "theirs"))
    adapted = lorakit.load(copy.deepcopy(model), tmp_path / "theirs")
    torch.testing.assert_close(logits(adapted.model), reference, atol=1e-5, rtol=1e-5)
    assert (reference - logits(model)).abs().max() > 1e-4
    adapter = adapted.state()
    assert adapter.recipe.name == recipe
    to_peft(adapter, tmp_path / "again", model=adapted.model)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "theirs")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "theirs")
    assert same(from_peft(tmp_path / "again", model=model), adapter)
    save_adapter(adapter, tmp_path / "ours")  # the detour over lorakit's own format changes nothing
    to_peft(load_adapter(tmp_path / "ours"), tmp_path / "third", model=adapted.model)
    assert config_of(tmp_path / "third") == config_of(tmp_path / "theirs")
    assert weights_of(tmp_path / "third") == weights_of(tmp_path / "theirs")
    if not adapter.recipe.kwargs.get("compact"):
        lorakit.attach(copy.deepcopy(model), adapter.method())  # the recipe trains afresh


LOW = {
    "w2 of a rank": {"r": 2},
    "both of a rank": {"r": 2, "decompose_both": True, "alpha": 6},
    "scales by pattern": {"r": 2, "alpha_pattern": {"up_proj": 3}},
    "ranks by pattern": {"r": 32, "rank_pattern": {"up_proj": 2}},
}


@pytest.mark.parametrize("what", LOW)
def test_a_lokr_of_low_rank_factors_is_read_as_the_same_function(what, tmp_path):
    model = tiny_model("llama")
    reference = logits(filled(model, lambda: K(target_modules=["q_proj", "up_proj"], **LOW[what]), tmp_path / "a"))
    adapted = lorakit.load(copy.deepcopy(model), tmp_path / "a")
    torch.testing.assert_close(logits(adapted.model), reference, atol=1e-5, rtol=1e-5)
    to_peft(adapted.state(), tmp_path / "b", model=adapted.model)  # and goes out with its factors multiplied
    torch.testing.assert_close(logits(in_peft(model, tmp_path / "b")), reference, atol=1e-5, rtol=1e-5)
    assert {k.rpartition(".")[2] for k in safetensors.torch.load(weights_of(tmp_path / "b"))} == {"lokr_w1", "lokr_w2"}


@pytest.mark.parametrize("name", SMALL)
def test_peft_saves_what_we_wrote_as_we_wrote_it(name, tmp_path):
    base, adapted = made(name, unfreeze=("norm",))
    to_peft(adapted.state(), tmp_path / "a", model=adapted.model)
    save_by_peft(in_peft(base, tmp_path / "a"), tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


def test_the_projections_of_a_folder_count_not_those_of_its_key(tmp_path):
    """A pair that another version of torch drew."""
    model = tiny_model("llama")
    filled(model, lambda: V(r=4, target_modules=ALL), tmp_path)
    tensors = safetensors.torch.load(weights_of(tmp_path))
    tensors["base_model.vera_A"] += 0.1
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    reference = logits(in_peft(model, tmp_path))
    adapted = lorakit.load(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(adapted.model), reference, atol=1e-5, rtol=1e-5)
    with pytest.raises(lorakit.NotExportable, match="projection A is not the one that its key gives"):
        compact(adapted.state())


# ----------------------------------------------------------------------------------------------------------------- smaller files
@pytest.mark.parametrize("name", ["vera", "vb_lora"])
def test_the_compact_form_computes_the_same_in_a_smaller_file(name, tmp_path):
    base, adapted = made(name)
    adapted.save(tmp_path / "full")
    want = logits(adapted.model)
    for to in ("peft", "lorakit"):
        folder = tmp_path / to
        convert(tmp_path / "full", folder, to=to, smaller=True, model=copy.deepcopy(base))
        read = lorakit.load(copy.deepcopy(base), folder)
        torch.testing.assert_close(logits(read.model), want, atol=5e-6, rtol=1e-6)
        sizes = [sum(t.nbytes for t in load_adapter(f, model=base).tensors.values()) for f in (tmp_path / "full", folder)]
        assert sizes[1] < 0.7 * sizes[0]
    torch.testing.assert_close(logits(in_peft(base, tmp_path / "peft")), want, atol=5e-6, rtol=1e-6)
    assert same(load_adapter(tmp_path / "peft"), load_adapter(tmp_path / "lorakit"))


def test_other_methods_have_no_smaller_form():
    adapted = shaken(tiny_model("llama"), "lora", r=2)
    with pytest.raises(lorakit.NotExportable, match="lora has no smaller form.*vera and vb_lora have one"):
        compact(adapted.state())


# -------------------------------------------------------------------------------------------------------------------- refusals
def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CONFIGS = {
    "a type of no name": (
        lambda: V(r=4, target_modules=ALL),
        {"peft_type": "OFT"},
        lorakit.NotExportable,
        "peft_type OFT.*reads LORA, ADALORA",
    ),
    "pair that is not there": (
        lambda: V(r=4, target_modules=ALL, save_projection=False),
        {"save_projection": True},
        lorakit.AdapterMismatch,
        "says that vera_A and vera_B are saved",
    ),
    "rank of nothing": (lambda: V(r=4, target_modules=ALL), {"r": 0}, lorakit.CheckpointError, "r=0"),
    "another rank": (lambda: V(r=4, target_modules=ALL), {"r": 5}, Mismatch, "shape"),
    "key of text": (lambda: V(r=4, target_modules=ALL), {"projection_prng_key": "1"}, lorakit.CheckpointError, "projection_prng_key='1'"),
    "bias of another type": (lambda: V(r=4, target_modules=ALL), {"bias": "lora_only"}, lorakit.CheckpointError, "bias='lora_only'"),
    "other targets": (
        lambda: V(r=4, target_modules=ALL),
        {"target_modules": ["k_proj"]},
        lorakit.AdapterMismatch,
        "does not name that module",
    ),
    "field of no meaning": (lambda: V(r=4, target_modules=ALL), {"use_something_new": 3}, lorakit.NotExportable, "use_something_new=3"),
    "logits for a choice": (lambda: B(target_modules=ALL, **BANK), {"save_only_topk_weights": True}, Mismatch, "A_indices"),
    "a shorter bank": (
        lambda: B(target_modules=ALL, save_only_topk_weights=True, **BANK),
        {"num_vectors": 3},
        lorakit.AdapterMismatch,
        "chooses vectors that the bank of 3",
    ),
    "vectors of another length": (lambda: B(target_modules=ALL, **BANK), {"vector_length": 4}, Mismatch, "shape"),
    "vectors that do not fit": (lambda: B(target_modules=ALL, **BANK), {"vector_length": 7}, Mismatch, "shape"),
    "more chosen than there are": (lambda: B(target_modules=ALL, **BANK), {"topk": 13}, lorakit.BadParameter, "topk=13"),
    "other places": (
        lambda: F(n_frequency=20, target_modules=ALL),
        {"n_frequency": 19},
        lorakit.AdapterMismatch,
        "gives it n_frequency=19",
    ),
    "endless pattern": (
        lambda: F(n_frequency=20, target_modules=ALL),
        {"n_frequency_pattern": {"(a+)+b": 4}},
        lorakit.CheckpointError,
        "forever",
    ),
    "factor of nothing": (lambda: K(r=32, target_modules=ALL), {"decompose_factor": 0}, lorakit.CheckpointError, "decompose_factor=0"),
    "another factor": (lambda: K(r=32, target_modules=ALL), {"decompose_factor": 2}, Mismatch, "shape"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_cannot_be_followed(what, tmp_path):
    config, changes, error, message = CONFIGS[what]
    model = tiny_model("llama")
    filled(model, config, tmp_path)
    edited(tmp_path, **changes)
    before = logits(model)
    with pytest.raises(error, match=message) as caught:
        lorakit.load(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", SMALL)
def test_a_tensor_too_few_or_too_many_is_an_error(name, tmp_path):
    base, adapted = made(name, sites=["q_proj", "up_proj"])
    to_peft(adapted.state(), tmp_path, model=adapted.model)
    tensors = safetensors.torch.load(weights_of(tmp_path))
    own = max(tensors)
    for broken in ({k: v for k, v in tensors.items() if k != own}, tensors | {f"{own}x": tensors[own].clone()}):
        safetensors.torch.save_file(broken, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(lorakit.AdapterMismatch) as caught:
            lorakit.load(base, tmp_path)
        assert "\n" not in str(caught.value)


def test_lokr_has_no_place_for_biases(tmp_path):
    _, adapted = made("krona", model={"attention_bias": True}, sites="q_proj", unfreeze=("q_proj.bias",))
    with pytest.raises(lorakit.NotExportable, match=r"LOKR has no place for the biases.*--plain"):
        to_peft(adapted.state(), tmp_path / "a", model=adapted.model)
    to_peft(adapted.state(), tmp_path / "b", model=adapted.model, native=False)


def test_every_type_is_tried_in_both_directions():
    assert set(TYPE.values()) | {"LORA", "ADALORA"} == set(TYPES)
    for name, kind in TYPE.items():
        assert name in TYPES[kind].table.native


def test_a_second_adapter_of_the_same_key_shares_nothing_but_numbers(tmp_path):
    base, adapted = made("vera", sites=["q_proj", "up_proj"])
    adapted.add("other", lorakit.get_method("vera", r=4, sites=["q_proj", "up_proj"]))
    one, other = (adapted.shared(name)["pool"] for name in ("default", "other"))
    assert torch.equal(one.A, other.A)
    assert one.A.data_ptr() != other.A.data_ptr()
    with quiet():
        to_peft(adapted.state("default"), tmp_path, model=adapted.model)
    assert dataclasses.replace(adapted.state("default"), meta={}).recipe == from_peft(tmp_path).recipe
    assert base is not adapted.model
