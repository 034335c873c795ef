"""PEFT's own adapters: read as ours, the same logits; saved again, the same files. And what is refused, in one clear line."""

import copy
import json
import warnings

import peft
import pytest
import safetensors.torch
import torch

import lorakit
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.peft import from_peft, to_peft
from tests.adapters.subject import IDS, in_peft, logits, made_by_peft, quiet, save_by_peft, shaken, tiny_model

LoRA = peft.LoraConfig
RANKS = {"q_proj": 2, "layers.1.mlp.down_proj": 5}


def case(label, config, arch="llama", *, recipe="lora", **model):
    return pytest.param(arch, model, config, recipe, id=label)


CASES = [
    case("lora", lambda: LoRA(r=4, target_modules=["q_proj", "v_proj"])),
    case("all-linear", lambda: LoRA(r=4, target_modules="all-linear", lora_dropout=0.1)),
    case("regex", lambda: LoRA(r=4, target_modules=r".*layers\.1\..*(q|k)_proj", init_lora_weights="gaussian")),
    case("full names", lambda: LoRA(r=4, target_modules=["model.layers.0.self_attn.q_proj"])),
    case("layers", lambda: LoRA(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers")),
    case("excluded", lambda: LoRA(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"])),
    case("rslora", lambda: LoRA(r=5, lora_alpha=7, use_rslora=True, target_modules=["q_proj"]), recipe="rslora"),
    case(
        "patterns",
        lambda: LoRA(r=4, target_modules=["q_proj", "down_proj"], rank_pattern=RANKS, alpha_pattern={"^model.layers.0.*": 3}),
    ),
    case("dora", lambda: LoRA(r=4, use_dora=True, target_modules=["q_proj", "up_proj"]), recipe="dora"),
    case("dora embedding", lambda: LoRA(r=4, use_dora=True, target_modules=["q_proj", "embed_tokens"]), recipe="dora"),
    case("dora rslora", lambda: LoRA(r=4, use_dora=True, use_rslora=True, target_modules=["q_proj"], rank_pattern=RANKS), recipe="dora"),
    case("pissa", lambda: LoRA(r=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]), recipe="pissa"),
    case("pissa embedding", lambda: LoRA(r=4, init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"]), recipe="pissa"),
    case("pissa gpt2", lambda: LoRA(r=4, init_lora_weights="pissa", use_rslora=True, target_modules=["c_attn"]), "gpt2", recipe="pissa"),
    case("embedding", lambda: LoRA(r=4, target_modules=["q_proj", "embed_tokens"])),
    case("tied embedding", lambda: LoRA(r=4, target_modules=["q_proj", "embed_tokens"]), tied=True),
    case("tied head", lambda: LoRA(r=4, target_modules=["q_proj", "lm_head"]), tied=True),
    case("modules to save", lambda: LoRA(r=4, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])),
    case("own biases", lambda: LoRA(r=4, target_modules=["q_proj"], bias="lora_only"), attention_bias=True),
    case("all biases", lambda: LoRA(r=4, target_modules=["q_proj"], bias="all"), attention_bias=True),
    case("gpt2", lambda: LoRA(r=4, target_modules=["c_attn", "wte"]), "gpt2"),
    case("gpt2 dora", lambda: LoRA(r=4, target_modules=["c_attn", "mlp.c_proj"], use_dora=True), "gpt2", recipe="dora"),
    case("classifier", lambda: LoRA(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"), task="sequence-classification"),
    case("classifier of two", lambda: LoRA(r=4, target_modules=["query"], task_type="SEQ_CLS"), "roberta", task="sequence-classification"),
    case("adalora", lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "o_proj"]), recipe="adalora"),
    case(
        "adalora classifier",
        lambda: peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["c_attn"], task_type="SEQ_CLS"),
        "gpt2", recipe="adalora", task="sequence-classification",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "overrides", "config", "recipe"), CASES)
def test_the_same_logits_and_the_same_files(arch, overrides, config, recipe, tmp_path):
    model = tiny_model(arch, **overrides)
    with warnings.catch_warnings(action="ignore"):
        reference = logits(made_by_peft(model, config(), tmp_path / "theirs"))
    adapted = lorakit.load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(adapted.model), reference, atol=1e-5, rtol=1e-5)
    adapter = adapted.state()
    assert adapter.recipe.name == recipe
    to_peft(adapter, tmp_path / "again", model=adapted.model, save_embedding_layers=True)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "theirs")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "theirs")
    assert same(from_peft(tmp_path / "again", model=model), adapter)
    save_adapter(adapter, tmp_path / "ours")  # the detour over lorakit's own format changes nothing
    to_peft(load_adapter(tmp_path / "ours"), tmp_path / "third", model=adapted.model, save_embedding_layers=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def same(one, other):
    tensors = all(torch.equal(one.tensors[k], v) for k, v in other.tensors.items())
    return (one.recipe, one.sites, one.meta, one.tensors.keys()) == (
        other.recipe,
        other.sites,
        other.meta,
        other.tensors.keys(),
    ) and tensors


def config_of(folder):
    """The configuration, its sets as sets."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v) if isinstance(v, list) and k in ("target_modules", "exclude_modules") else v for k, v in config.items()}


def weights_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------- PEFT's own four properties of its state dicts
def test_peft_saves_what_we_wrote_as_we_wrote_it(tmp_path):
    """Keys and stability: PEFT loads our folder and saves it again, to the same bytes and the same configuration."""
    model = tiny_model("llama")
    adapted = shaken(model, "dora", sites=["q_proj", "embed_tokens"], unfreeze=("norm",))
    base = adapted.model
    to_peft(adapted.state(), tmp_path / "a", model=base, save_embedding_layers=True)
    save_by_peft(in_peft(tiny_model("llama"), tmp_path / "a"), tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


def test_the_adapters_name_in_peft_does_not_matter(tmp_path):
    model = tiny_model("llama")
    made = made_by_peft(model, LoRA(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path / "a")
    named = in_peft(model, tmp_path / "a", adapter_name="other")
    save_by_peft(named, tmp_path / "b")  # PEFT puts it into b/other
    with pytest.raises(lorakit.CheckpointError, match=r"there is one in .*other"):
        load_adapter(tmp_path / "b", model=model)
    assert same(from_peft(tmp_path / "b" / "other", model=model), from_peft(tmp_path / "a", model=model))
    torch.testing.assert_close(logits(lorakit.load(model, tmp_path / "b" / "other").model), logits(made), atol=1e-5, rtol=1e-5)


def test_outputs_survive_peft_lorakit_peft(tmp_path):
    model = tiny_model("gpt2")
    made = made_by_peft(model, LoRA(r=4, target_modules=["c_attn", "c_fc"], use_rslora=True), tmp_path / "a")
    to_peft(from_peft(tmp_path / "a", model=model), tmp_path / "b", model=model)
    torch.testing.assert_close(logits(in_peft(model, tmp_path / "b")), logits(made), atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------------- AdaLoRA
def test_an_adalora_that_peft_trained_and_pruned(tmp_path):
    """Down to no rank at all at some sites; what was pruned comes back as zeros, and goes out again as it came."""
    model = tiny_model("llama")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, total_step=12, tfinal=2, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    with quiet():
        made = peft.get_peft_model(copy.deepcopy(model), config).train()
        optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
        for step in range(12):
            made(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            made.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        save_by_peft(made, tmp_path / "a")
    ranks = [sum(mask) for mask in config_of(tmp_path / "a")["rank_pattern"].values()]
    assert sum(ranks) == 6
    assert 0 in ranks
    adapted = lorakit.load(model, tmp_path / "a")
    torch.testing.assert_close(logits(adapted.model), logits(made), atol=1e-5, rtol=1e-5)
    assert sum(int((b.delta.g != 0).sum()) for b in adapted.branches()) == 6
    to_peft(adapted.state(), tmp_path / "b", model=adapted.model)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


# --------------------------------------------------------------------------------------------------------------- corners of LoRA
def test_the_first_matching_pattern_of_the_file_counts(tmp_path):
    """PEFT asks the patterns in the file's order; a file that was edited by hand need not be sorted."""
    model = tiny_model("llama")
    patterns = {"q_proj": 2, "layers.0.self_attn.q_proj": 6}
    reference = logits(made_by_peft(model, LoRA(r=4, target_modules=["q_proj"], rank_pattern=dict(patterns)), tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config["rank_pattern"]) == sorted(patterns)  # sorted by PEFT: now layer 0 would get 6 ranks, for tensors of 2
    with pytest.raises(lorakit.AdapterMismatch, match=r"has 2 ranks, and .* gives it r=6"):
        from_peft(tmp_path, model=model)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": patterns}))
    torch.testing.assert_close(logits(lorakit.load(model, tmp_path).model), reference, atol=1e-5, rtol=1e-5)


def test_patterns_that_match_nothing_stay_in_the_file_and_out_of_the_recipe(tmp_path):
    """lorakit refuses to train with them; PEFT, whose file says them, finds them in it again."""
    model = tiny_model("llama")
    made_by_peft(model, LoRA(r=4, target_modules=["q_proj"], rank_pattern=RANKS), tmp_path / "a")
    adapter = from_peft(tmp_path / "a", model=model)
    assert adapter.recipe.kwargs["rank_pattern"] == {"q_proj": 2}
    to_peft(adapter, tmp_path / "b", model=model)
    assert config_of(tmp_path / "b") == config_of(tmp_path / "a")
    lorakit.attach(model, adapter.method())  # the recipe trains afresh


def test_a_rank_beyond_the_matrix_is_read_as_the_same_function(tmp_path):
    model = tiny_model("llama", task="sequence-classification")  # its head has 3 rows
    made = made_by_peft(model, LoRA(r=8, target_modules=["q_proj", "score"]), tmp_path)
    adapted = lorakit.load(model, tmp_path)
    assert {b.site.name: b.delta.r for b in adapted.branches()}["score"] == 3
    torch.testing.assert_close(logits(adapted.model), logits(made), atol=1e-5, rtol=1e-5)


def test_a_folder_that_peft_trained_on_is_read_as_what_it_is_now(tmp_path):
    """lorakit.json beside it speaks of files that are no longer there."""
    model = tiny_model("llama")
    adapted = shaken(model, "loraplus", sites=["q_proj"])
    to_peft(adapted.state(), tmp_path, model=model)
    assert from_peft(tmp_path).recipe.name == "loraplus"
    changed = in_peft(tiny_model("llama"), tmp_path, is_trainable=True)
    with torch.no_grad():
        for p in changed.parameters():
            if p.requires_grad:
                p.mul_(2)
    save_by_peft(changed, tmp_path)
    read = from_peft(tmp_path, model=model)
    assert read.recipe.name == "lora"
    fresh = lorakit.load(adapted.detach(), tmp_path)
    torch.testing.assert_close(logits(fresh.model), logits(changed), atol=1e-5, rtol=1e-5)


def test_reading_needs_the_model_only_where_the_folder_does_not_say(tmp_path):
    model = tiny_model("llama")
    made_by_peft(model, LoRA(r=4, target_modules=["q_proj"]), tmp_path / "theirs")
    with pytest.raises(lorakit.CheckpointError, match="give the model"):
        from_peft(tmp_path / "theirs")
    adapted = shaken(model, "pissa", sites=["q_proj"])
    to_peft(adapted.state(), tmp_path / "pissa")
    with pytest.raises(lorakit.CheckpointError, match="give the model"):
        from_peft(tmp_path / "pissa")


def test_an_adapted_model_takes_a_second_adapter_from_peft(tmp_path):
    model = tiny_model("llama")
    reference = logits(made_by_peft(model, LoRA(r=4, target_modules=["q_proj"]), tmp_path))
    adapted = shaken(model, "lora")
    adapted.add("theirs", load_adapter(tmp_path, model=adapted.model)).switch("theirs")
    torch.testing.assert_close(logits(adapted.model), reference, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------------- refusals
def edited(folder, **changes):
    """The folder with a changed configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def plain(tmp_path):
    model = tiny_model("llama")
    made_by_peft(model, LoRA(r=4, target_modules=["q_proj"]), tmp_path)
    return model, tmp_path


CONFIGS = {
    "type": ({"peft_type": "OFT"}, lorakit.NotExportable, "peft_type OFT"),
    "niter": ({"init_lora_weights": "pissa_niter_4"}, lorakit.NotExportable, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
    "olora": ({"init_lora_weights": "olora"}, lorakit.NotExportable, "olora"),
    "pissa dora": ({"init_lora_weights": "pissa", "use_dora": True}, lorakit.NotExportable, "PiSSA together with DoRA"),
    "bias": ({"lora_bias": True}, lorakit.NotExportable, "lora_bias"),
    "tokens": ({"trainable_token_indices": [1]}, lorakit.NotExportable, "trainable_token_indices"),
    "replicated": ({"layer_replication": [[0, 2], [0, 2]]}, lorakit.NotExportable, "layer_replication"),
    "unknown": ({"use_something_new": 3}, lorakit.NotExportable, "use_something_new=3.*does not know"),
    "no type": ({"peft_type": None}, lorakit.CheckpointError, "names no peft_type"),
    "rank of text": ({"r": "4"}, lorakit.CheckpointError, "r='4'"),
    "rank of nothing": ({"r": 0}, lorakit.CheckpointError, "r=0"),
    "alpha of infinity": ({"lora_alpha": float("inf")}, lorakit.CheckpointError, "lora_alpha=inf"),
    "odd pattern": ({"rank_pattern": {"(": 4}}, lorakit.CheckpointError, "not a regular expression"),
    "endless pattern": ({"rank_pattern": {"(a+)+b": 4}}, lorakit.CheckpointError, "forever"),
    "endless target": ({"target_modules": ".*.*.*.*.*.*x"}, lorakit.CheckpointError, "forever"),
    "another rank": ({"r": 8}, lorakit.AdapterMismatch, "has 4 ranks, and .* gives it r=8"),
    "other targets": ({"target_modules": ["k_proj"]}, lorakit.AdapterMismatch, "does not name that module"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_cannot_be_followed(what, plain):
    model, folder = plain
    changes, error, message = CONFIGS[what]
    edited(folder, **changes)
    with pytest.raises(error, match=message) as caught:
        lorakit.load(model, folder)
    assert "\n" not in str(caught.value)


def test_harmless_unknown_fields_are_no_obstacle(plain):
    model, folder = plain
    edited(folder, use_something_new=None, another_switch=False, runtime_config={"x": 1})
    lorakit.load(model, folder)


PREFIX = "base_model.model.model"
Q = f"{PREFIX}.layers.0.self_attn.q_proj"


def pair(module):
    """A well-shaped pair for one more module."""
    return {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(32, 4)}


TENSORS = {
    "missing": (lambda t: t.pop(f"{Q}.lora_B.weight"), "needs them"),
    "no module of that name": (lambda t: t.update(pair(f"{Q}x")), "Did you mean"),
    "other kind": (lambda t: t.update(pair(f"{PREFIX}.norm")), "lacks"),
    "a part of a fused weight": (lambda t: t.update(pair(f"{Q}[q]")), "lacks"),
    "of no meaning": (lambda t: t.update({f"{Q}.extra": torch.ones(1)}), "neither one of peft_type LORA"),
    "of no prefix": (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(1)}), "does not start with"),
    "misshaped": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 31)}), r"q_proj: tensor A has shape \(4, 31\).*needs \(4, 32\)"),
    "not a pair": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 32)}), "do not fit each other"),
    "not finite": (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 32), float("nan"))}), "NaN"),
    "of integers": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}), "expected floating-point"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(what, plain):
    model, folder = plain
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change, message = TENSORS[what]
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    before = logits(model)
    with pytest.raises(lorakit.AdapterMismatch, match=message) as caught:
        lorakit.load(model, folder)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)


def test_pickles_are_never_opened(plain):
    model, folder = plain
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(lorakit.CheckpointError, match=r"adapter_model.bin is a pickle.*convert it to safetensors"):
        lorakit.load(model, folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")  # under a false name
    with pytest.raises(lorakit.CheckpointError, match=r"adapter_model.safetensors is a pickle"):
        lorakit.load(model, folder)


def test_a_base_weight_in_the_folder_must_be_the_bases(tmp_path):
    """PEFT loads it over the base's own; here it must agree."""
    model = tiny_model("llama")
    made_by_peft(model, LoRA(r=4, target_modules=["embed_tokens"]), tmp_path)
    lorakit.load(model, tmp_path).detach()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] += 1
    with pytest.raises(lorakit.AdapterMismatch, match="resized, or the base trained"):
        lorakit.load(model, tmp_path)


def test_a_resized_vocabulary_comes_as_a_whole_weight(tmp_path):
    """PEFT saves embeddings that were resized: they are the adapter's then."""
    model = tiny_model("llama")
    small = copy.deepcopy(model)
    for m in (model, small):
        with quiet():
            m.resize_token_embeddings(130, mean_resizing=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[128:] = 0.3
        model.lm_head.weight[128:] = -0.2
    with quiet():
        made = peft.get_peft_model(copy.deepcopy(model), LoRA(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
        made.save_pretrained(tmp_path, save_embedding_layers=True)
    adapted = lorakit.load(small, tmp_path)
    torch.testing.assert_close(logits(adapted.model), logits(made), atol=1e-5, rtol=1e-5)
    assert adapted.state().recipe.kwargs["unfreeze"] == ("model.embed_tokens", "lm_head")
