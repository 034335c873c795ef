"""Ours, written as PEFT's, loaded by the real PEFT: the same logits. And read back: the very same adapter."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch

import lorakit
from lorakit.adapters.io import load_adapter
from lorakit.adapters.peft import from_peft, to_peft
from tests.adapters.subject import in_peft, logits, shaken, tiny_model

ALL = ["lora", "rslora", "loraplus", "lora_fa", "init_ab", "dora", "pissa", "adalora"]
PATTERNS = {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"layers.1.*": 5.0, "v_proj": 9.0}}
EVERYWHERE = ["all-linear", "embedding", "lm_head"]


def case(name, arch="llama", model=None, **kwargs):
    label = "-".join([name, arch, *map(str, (model or {}).items()), *kwargs])
    return pytest.param(name, arch, model or {}, kwargs, id=label)


EXACT = [
    *[case(name, arch) for name in ALL for arch in ("llama", "gpt2")],
    *[case(name, patterned=True) for name in ("lora", "rslora", "dora", "pissa")],
    *[case(name, model={"tied": tied}, sites=EVERYWHERE) for name in ALL for tied in (False, True)],
    *[case(name, "gpt2", sites=["c_attn[q]", "c_attn[v]", "c_fc"]) for name in ALL],
    *[case(name, "gpt_neox", sites="qv") for name in ("lora", "dora")],
    *[case(name, model={"task": "sequence-classification"}, unfreeze=("score",)) for name in ALL],
    case("lora", "roberta", {"task": "sequence-classification"}, unfreeze=("classifier",)),
    case("lora", "bert", {"task": "sequence-classification"}, unfreeze=("*.bias", "classifier")),
    case("lora", model={"attention_bias": True}, sites="q_proj", unfreeze=("q_proj.bias", "norm")),
    case("lora", "t5", {"task": "causal-lm"}, sites=["q", "v", "shared"]),
    case("lora", sites=["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"]),
    case("pissa", niter=4),
    case("init_ab", init="B"),
]


def made(name, arch, overrides, kwargs):
    """(an untouched base, the model with the adapter attached)."""
    model = tiny_model(arch, **overrides)
    kwargs = dict(kwargs)
    if kwargs.pop("patterned", False):
        kwargs |= PATTERNS
    return copy.deepcopy(model), shaken(model, name, **kwargs)


def same(one, other):
    assert (one.recipe, one.sites, one.meta) == (other.recipe, other.sites, other.meta)
    assert one.tensors.keys() == other.tensors.keys()
    return all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)


PLAIN = [p for p in EXACT if p.values[0] != "dora"]  # DoRA has no plain form
FORMS = [
    pytest.param(native, *p.values, id=f"{word}-{p.id}")
    for native, word, ps in ((True, "native", EXACT), (False, "plain", PLAIN))
    for p in ps
]


@pytest.mark.parametrize(("native", "name", "arch", "overrides", "kwargs"), FORMS)
def test_peft_computes_the_same_and_the_folder_reads_back_as_the_same_adapter(native, name, arch, overrides, kwargs, tmp_path):
    base, adapted = made(name, arch, overrides, kwargs)
    ids = torch.arange(20, 32)[None]
    extra = {"decoder_input_ids": ids} if arch == "t5" else {}
    adapter = adapted.state()
    task = "SEQ_CLS" if "unfreeze" in kwargs and "task" in overrides else None
    result = to_peft(adapter, tmp_path / "peft", native=native, model=adapted.model, task_type=task)
    assert not result.errors
    with torch.no_grad():
        ours = adapted.model.eval()(input_ids=ids, **extra).logits
        theirs = in_peft(base, tmp_path / "peft")(input_ids=ids, **extra).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    back = load_adapter(tmp_path / "peft", model=base)
    if name == "adalora" and result.peft_type == "LORA":  # pruned triplets and g are gone: the same function as plain LoRA
        assert back.recipe.name == "lora"
        assert {k: v for k, v in back.meta.items() if k != "peft"} == adapter.meta
    else:
        assert same(back, adapter)
    with torch.no_grad():
        loaded = lorakit.load(base, tmp_path / "peft").model.eval()(input_ids=ids, **extra).logits
    torch.testing.assert_close(loaded, ours, atol=1e-6, rtol=1e-6)


def test_the_check_above_can_fail(tmp_path):
    """A wrong scale in the file is seen by every comparison above."""
    base, adapted = made("lora", "llama", {}, {})
    to_peft(adapted.state(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 1.001}))
    assert (logits(in_peft(base, tmp_path)) - logits(adapted.model)).abs().max() > 1e-4
    assert load_adapter(tmp_path, model=base).recipe.kwargs["alpha"] == pytest.approx(
        16.016
    )  # lorakit.json no longer speaks of these files


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
def test_pruned_adalora(native, tmp_path):
    """Triplets with g = 0 are left out, down to none; natively they come back as zeros."""
    base, adapted = made("adalora", "llama", {}, {"r": 6, "target_r": 3, "sites": ["q_proj", "v_proj"]})
    with torch.no_grad():
        for i, branch in enumerate(adapted.branches()):
            branch.delta.g[i + 3 :] = 0
        adapted.branches()[0].delta.g.zero_()
    adapter, ours = adapted.state(), logits(adapted.model)
    to_peft(adapter, tmp_path, native=native, model=adapted.model)
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), ours, atol=1e-5, rtol=1e-5)
    back = load_adapter(tmp_path, model=base)
    torch.testing.assert_close(logits(lorakit.load(base, tmp_path).model), ours, atol=1e-6, rtol=1e-6)
    if native:
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["rank_pattern"]["model.layers.0.self_attn.q_proj.lora_E"] == [False] * 6
        assert back.recipe == adapter.recipe
        for site in adapter.sites:
            kept = adapter.of(site)["g"] != 0
            for name, dim in (("A", 0), ("B", 1), ("g", 0)):
                expected = adapter.of(site)[name] * kept.view([-1 if d == dim else 1 for d in range(adapter.of(site)[name].ndim)])
                assert torch.equal(back.of(site)[name], expected)
    else:
        assert [s.name for s in back.sites] == [s.name for s in adapter.sites[1:]]


def test_a_fresh_adalora_is_not_taken_for_a_pruned_one(tmp_path):
    adapted = lorakit.attach(tiny_model("llama"), lorakit.get_method("adalora", r=4, target_r=2))
    to_peft(adapted.state(), tmp_path)
    assert same(from_peft(tmp_path), adapted.state())


def test_without_the_model_the_lists_hold_full_names(tmp_path):
    base, adapted = made("lora", "llama", {}, {"sites": ["q_proj", "lm_head"], "unfreeze": ("norm",)})
    to_peft(adapted.state(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), logits(adapted.model), atol=1e-5, rtol=1e-5)


def test_the_files_are_as_peft_writes_them(tmp_path):
    _, adapted = made("dora", "gpt2", {}, {"sites": ["c_attn", "wte"]})
    to_peft(adapted.state(), tmp_path, model=adapted.model, base_model="someone/base", task_type="CAUSAL_LM", save_embedding_layers=True)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert config["fan_in_fan_out"] is True
    assert config["inference_mode"] is True
    assert (config["base_model_name_or_path"], config["task_type"], config["auto_mapping"]) == ("someone/base", "CAUSAL_LM", None)
    assert config["target_modules"] == ["c_attn", "wte"]
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    tensors = safetensors.torch.load(data)
    assert {k.split("wte.")[1] for k in tensors if "wte" in k} == {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "lorakit.json"]


def test_the_plain_form_of_pissa_doubles_ranks_and_alphas(tmp_path):
    """In the words of the recipe, not module by module."""
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.*": 5.0, "v_proj": 9.0}}
    _, adapted = made("pissa", "llama", {}, {"r": 4, "alpha": 6.0, "sites": ["q_proj", "v_proj"], **patterns})
    to_peft(adapted.state(), tmp_path, native=False, model=adapted.model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    assert config["rank_pattern"] == {"q_proj": 6}
    assert config["alpha_pattern"] == {"layers.1.*": 10, "v_proj": 18}


def test_an_fp64_adapter_is_written_in_fp32(tmp_path):
    model = tiny_model("llama").double()
    adapted = shaken(model, "pissa")
    to_peft(adapted.state(), tmp_path, model=model)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------- what cannot be exact
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_what_has_no_exact_form_is_refused_or_approximated_with_its_error(arch, tmp_path):
    sites = ["q_proj", "down_proj"] if arch == "llama" else ["c_attn[q]", "c_attn[k]", "mlp.c_proj"]
    base, adapted = made("dora", arch, {}, {"r": 4, "sites": sites})
    adapter = adapted.state()
    with pytest.raises(lorakit.NotExportable, match=r"rescales W itself at \d+ sites .*svd_rank"):
        to_peft(adapter, tmp_path / "a", native=False)
    with pytest.raises(lorakit.NotExportable, match="give the model"):
        to_peft(adapter, tmp_path / "a", native=False, svd_rank=4)
    assert not (tmp_path / "a").exists()
    totals = []
    for rank in (4, 16, 32):
        result = to_peft(adapter, tmp_path / str(rank), native=False, svd_rank=rank, model=adapted.model)
        assert set(result.errors) == {s.name for s in adapter.sites}
        totals.append(result.total)
        if rank == 4:
            _errors_are_the_real_ones(adapted, base, tmp_path / "4", result)
    assert totals[0] > totals[1] > totals[2]
    assert totals[2] < 1e-5
    torch.testing.assert_close(logits(in_peft(base, tmp_path / "32")), logits(adapted.model), atol=1e-4, rtol=1e-4)


def _errors_are_the_real_ones(adapted, base, folder, result):
    read = lorakit.load(copy.deepcopy(base), folder)
    truth = {b.site.name: b.weight() for b in adapted.branches()}
    close = {b.site.name: b.weight() for b in read.branches()}
    missed = square = 0.0
    for name, W in truth.items():
        rows = W.abs().sum(1) > 0  # a part's rows of the whole weight
        near = close[name.split("[")[0]][rows]
        assert result.errors[name] == pytest.approx((near - W[rows]).norm().item() / W.norm().item(), rel=1e-3)
        missed, square = missed + (near - W[rows]).norm().item() ** 2, square + W.norm().item() ** 2
    assert result.total == pytest.approx(math.sqrt(missed / square), rel=1e-3)
    assert result.lines()[-1].startswith("in total: relative error")


REFUSED = {
    "one parameter of a module": (
        "lora",
        {"attention_bias": True},
        {"sites": "q_proj", "unfreeze": ("k_proj.weight",)},
        {},
        "not whole modules or biases",
    ),
    "a site inside a trained module": ("lora", {}, {"sites": "q_proj", "unfreeze": ("layers.0",)}, {}, "trained as a whole"),
    "a head that the task needs": ("lora", {}, {"sites": "q_proj"}, {"task_type": "SEQ_CLS"}, "task_type SEQ_CLS"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals(why, tmp_path):
    name, overrides, kwargs, options, message = REFUSED[why]
    _, adapted = made(name, "llama", overrides, kwargs)
    with pytest.raises(lorakit.NotExportable, match=message):
        to_peft(adapted.state(), tmp_path / "x", model=adapted.model, **options)
    assert not (tmp_path / "x").exists()


def test_parts_of_fused_weights_need_the_model(tmp_path):
    _, adapted = made("lora", "gpt2", {}, {"sites": "c_attn[q]"})
    with pytest.raises(lorakit.NotExportable, match=r"c_attn\[q\] is part of a fused weight.*give the model"):
        to_peft(adapted.state(), tmp_path)


def test_parts_with_scales_of_their_own_are_folded(tmp_path):
    """PEFT has one scale a module: the others' go into B, and the folder reads back as LoRA on the whole weight."""
    kwargs = {"sites": ["c_attn[q]", "c_attn[v]"], "alpha_pattern": {r"c_attn\[v\]": 5.0}}
    base, adapted = made("lora", "gpt2", {}, kwargs)
    to_peft(adapted.state(), tmp_path, model=adapted.model)
    torch.testing.assert_close(logits(in_peft(base, tmp_path)), logits(adapted.model), atol=1e-5, rtol=1e-5)
    back = load_adapter(tmp_path, model=base)
    assert [s.name for s in back.sites] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    torch.testing.assert_close(logits(lorakit.load(base, tmp_path).model), logits(adapted.model), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    _, adapted = made("lora", "llama", {}, {})
    with pytest.raises(lorakit.AdapterMismatch, match="is not in this model"):
        to_peft(adapted.state(), tmp_path, model=tiny_model("gpt2"))


def test_the_two_formats_do_not_share_a_folder(tmp_path):
    _, adapted = made("lora", "llama", {}, {})
    adapted.save(tmp_path / "ours")
    to_peft(adapted.state(), tmp_path / "theirs")
    with pytest.raises(lorakit.CheckpointError, match="lorakit's format"):
        to_peft(adapted.state(), tmp_path / "ours")
    with pytest.raises(lorakit.CheckpointError, match="PEFT's format"):
        adapted.save(tmp_path / "theirs")


def test_a_dora_without_a_magnitude_is_refused(tmp_path):
    adapter = shaken(tiny_model("llama"), "dora", r=2).state()
    del adapter.tensors["model.layers.0.self_attn.q_proj.m"]
    with pytest.raises(lorakit.AdapterMismatch, match=r"layers.0.self_attn.q_proj.m is missing"):
        to_peft(adapter, tmp_path / "out")
