"""A file as an adapter on its model. The fixtures: see test_kohya.py."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from lorakit.adapters.cut import Cut
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.kohya import read_modules
from lorakit.adapters.kohya_names import Places
from lorakit.adapters.kohya_read import closest_in, from_kohya, inspect_file
from lorakit.core.attach import attach_adapter
from tests.adapters.lycoris.make import HERE, base, clip
from tests.adapters.subject import logits

EXACT = {
    "locon": "lora",
    "locon_rs": "lora",
    "loha": "lora",
    "lokr_both": "lora",
    "glora": "lora",
    "norms": "lora",
    "clip": "lora",
    "dora": "dora",
    "loha_dora": "dora",
    "lokr": "krona",
    "lokr_full": "krona",
}
IDS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def model_of(name: str) -> nn.Module:
    return clip() if name == "clip" else base(name)


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("name", EXACT)
def test_the_adapted_model_is_the_one_with_lycoris_changes_in_its_weights(name: str) -> None:
    """Weights, biases and norms with what LyCORIS adds to them, and the adapter attached: the same outputs."""
    wanted, places = model_of(name), Places(model_of(name))
    with torch.no_grad():
        for key, delta in load_file(HERE / f"{name}.delta.safetensors").items():
            module, kind = key.rsplit(".", 1)
            wanted.get_parameter(f"{places.path(module)}.{kind}").add_(delta)
    adapter = from_kohya(HERE / f"{name}.safetensors", model=model_of(name))
    assert adapter.recipe.name == EXACT[name]
    model = model_of(name)
    before = out(model)
    attach_adapter(model, adapter)
    torch.testing.assert_close(out(model), out(wanted), atol=2e-5, rtol=1e-4)
    assert (out(model) - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", EXACT)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    adapter = from_kohya(HERE / f"{name}.safetensors", model=model_of(name))
    save_adapter(adapter, tmp_path / "a")
    again = load_adapter(tmp_path / "a")
    assert again.sites == adapter.sites
    assert all(torch.equal(again.tensors[key], t) for key, t in adapter.tensors.items())
    assert adapter.meta["kohya"]["algorithms"]


def test_a_file_goes_through_the_one_door() -> None:
    model = base("loha")
    adapted = lorakit.attach(copy.deepcopy(model), lorakit.get_method("lora", r=2))
    adapted.load(HERE / "loha.safetensors", "loha")
    found = load_adapter(HERE / "loha.safetensors", model=model)
    torch.testing.assert_close(logits(adapted.model, IDS), logits(attach_adapter(model, found).model, IDS))


@pytest.mark.parametrize("name", ["full", "ia3"])
def test_a_full_matrix_needs_a_cut_and_says_its_error(name: str) -> None:
    path, model = HERE / f"{name}.safetensors", base(name)
    with pytest.raises(lorakit.NotExportable, match=r"too wide for an exact plain LoRA; --rank R \(or --energy 0\.99\)"):
        from_kohya(path, model=model)
    places, deltas = Places(model), load_file(HERE / f"{name}.delta.safetensors")
    found = closest_in(path, model=model, cut=Cut(rank=3))
    assert found.adapter.recipe.name == "lora"
    for key, delta in deltas.items():
        if key.endswith("weight") and "norm" not in key:
            site = places.path(key.rsplit(".", 1)[0])
            f = found.adapter.factors()[site]
            error = (f.s * f.B.double() @ f.A.double() - delta.double()).norm() / delta.double().norm()
            assert abs(error - found.errors[site]) < 1e-6
            best = torch.linalg.svdvals(delta.double())
            assert abs(error - best[3:].norm() / best.norm()) < 1e-6
    whole = closest_in(path, model=model, cut=Cut(rank=99))
    assert whole.total < 1e-12


def test_dora_cut_is_the_closest_to_what_it_does_to_w() -> None:
    model, deltas = base("dora"), load_file(HERE / "dora.delta.safetensors")
    found = closest_in(HERE / "dora.safetensors", model=model, cut=Cut(rank=4))
    for key, delta in deltas.items():
        values = torch.linalg.svdvals(delta.double())
        assert abs(found.errors[Places(model).path(key.rsplit(".", 1)[0])] - values[4:].norm() / values.norm()) < 1e-5


def test_what_needs_the_model_says_so() -> None:
    for name, said in (("glora", "depends on W: give the model"), ("norms", "adds to a whole bias.*--model"), ("ia3", "depends on W")):
        with pytest.raises(lorakit.NotExportable, match=said):
            from_kohya(HERE / f"{name}.safetensors")
    assert from_kohya(HERE / "clip.safetensors").sites[0].name == "text_model.encoder.layers.1.self_attn.k_proj"


def test_convolutions_are_read_and_not_attached() -> None:
    found = closest_in(HERE / "conv_locon.safetensors")
    assert {site.name: (site.d_out, site.d_in) for site in found.adapter.sites} == {"point": (4, 8), "wide": (8, 54)}
    with pytest.raises(lorakit.AdapterMismatch, match="the file's module lycoris_point is none of this model's"):
        from_kohya(HERE / "conv_locon.safetensors", model=base("locon"))


def test_dora_by_columns_and_a_mixture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(lorakit.NotExportable, match="has a size for each column of W"):
        from_kohya(HERE / "dora_columns.safetensors", model=base("dora"))
    tensors = load_file(HERE / "dora.safetensors")
    save_file({k: t for k, t in tensors.items() if "q_proj.dora" not in k}, tmp_path / "f.safetensors")
    with pytest.raises(lorakit.NotExportable, match="dora_scale at some modules and not at lycoris_model_layers_0_self_attn_q_proj"):
        from_kohya(tmp_path / "f.safetensors", model=base("dora"))


def test_another_model_and_a_module_twice(tmp_path: Path) -> None:
    tensors = load_file(HERE / "locon.safetensors")
    wide = {k: torch.cat([t, t], 1) if "q_proj.lora_down" in k else t for k, t in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(lorakit.AdapterMismatch, match=r"q_proj is 16 × 32; in this model model\.layers\.0\.self_attn\.q_proj is 16 × 16"):
        from_kohya(tmp_path / "wide.safetensors", model=base("locon"))
    twice = {**tensors, **{k.replace("lycoris_", "lora_te_"): t.clone() for k, t in tensors.items()}}
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(lorakit.AdapterMismatch, match="several modules are model.layers.0"):
        from_kohya(tmp_path / "twice.safetensors", model=base("locon"))
    assert len(from_kohya(tmp_path / "twice.safetensors", model=base("locon"), only="lora_te").sites) == 3


def test_a_lora_may_be_as_wide_as_the_matrix_and_wider(tmp_path: Path) -> None:
    up, down = torch.randn(8, 20), torch.randn(20, 16)
    name = "lycoris_model_layers_0_self_attn_k_proj"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "f.safetensors")
    adapter = from_kohya(tmp_path / "f.safetensors", model=base("locon"))
    [delta] = adapter.deltas().values()
    assert adapter.recipe.kwargs["r"] == 8
    torch.testing.assert_close(delta.weight(), up @ down, atol=1e-4, rtol=1e-4)
    attach_adapter(base("locon"), adapter)


def test_vectors_alone_are_no_adapter(tmp_path: Path) -> None:
    kept = {k: t for k, t in load_file(HERE / "norms.safetensors").items() if "layernorm" in k}
    save_file(kept, tmp_path / "f.safetensors")
    with pytest.raises(lorakit.NotExportable, match="changes 2 vectors and no matrix"):
        from_kohya(tmp_path / "f.safetensors", model=base("norms"))


@pytest.mark.parametrize("name", ["locon", "loha_dora", "lokr", "glora", "full", "conv_tucker_lokr", "clip"])
def test_inspection_shows_every_module(name: str) -> None:
    path = HERE / f"{name}.safetensors"
    report = inspect_file(path)
    assert [row["name"] for row in report.modules] == [m.name for m in read_modules(path)]
    assert report.bytes == path.stat().st_size
    if name == "clip":
        rows = inspect_file(path, model=clip()).modules
        deltas = load_file(HERE / "clip.delta.safetensors")
        assert [row["norm"] for row in rows] == pytest.approx([d.norm().item() for d in deltas.values()], rel=1e-5)
        assert rows[0]["path"] == "encoder.layers.1.self_attn.k_proj"
