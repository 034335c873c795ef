"""A GGUF LoRA from an adapter in a folder or a file, without the base's weights where its configuration is enough."""

from pathlib import Path

import gguf
import pytest
import torch

import lorakit
from lorakit.adapters.cut import Cut
from lorakit.adapters.io import load_adapter
from lorakit.serve import export
from lorakit.serve.export import any_model, base_for, export_gguf
from lorakit.serve.open import recorded
from tests.adapters.lycoris.make import HERE, base, clip
from tests.adapters.subject import shaken, tiny_model
from tests.train.runs import model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model") / "m")


def names(path: Path) -> set[str]:
    return {t.name for t in gguf.GGUFReader(path).tensors}


def test_the_configuration_alone_is_enough(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shaken(any_model(model), "pissa", sites=["q_proj"], r=2).save(tmp_path / "a")
    monkeypatch.setattr(export, "base_for", lambda *a, **k: pytest.fail("the base was loaded"))
    assert export_gguf(tmp_path / "a", tmp_path / "x.gguf", model=model) == ["GGUF LoRA for llama, 4 tensors, alpha 16, exact in fp32"]
    assert names(tmp_path / "x.gguf") == {f"blk.{i}.attn_q.weight.lora_{x}" for i in (0, 1) for x in "ab"}


def test_what_rescales_the_base_is_cut_with_it(model: str, tmp_path: Path) -> None:
    shaken(any_model(model), "dora", sites=["q_proj"], r=2).save(tmp_path / "a")
    with pytest.raises(lorakit.NotExportable, match="dora rescales W itself"):
        export_gguf(tmp_path / "a", tmp_path / "x.gguf", model=model)
    lines = export_gguf(tmp_path / "a", tmp_path / "x.gguf", model=model, cut=Cut(rank=4))
    assert [line for line in lines if "relative error" in line][-1].startswith("in total")
    assert gguf.GGUFReader(tmp_path / "x.gguf").fields["adapter.lora.alpha"].contents() == 4.0


def test_parts_of_a_fused_weight_have_the_base_loaded(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "gpt2")
    shaken(any_model(folder), "lora", sites=["c_attn[q]"]).save(tmp_path / "a")
    export_gguf(tmp_path / "a", tmp_path / "x.gguf", model=folder)
    assert "blk.0.attn_qkv.weight.lora_b" in names(tmp_path / "x.gguf")


def test_a_file_and_a_file_that_must_be_cut(tmp_path: Path) -> None:
    base("ia3").save_pretrained(tmp_path / "m")
    export_gguf(HERE / "loha.safetensors", tmp_path / "x.gguf", model=str(tmp_path / "m"))
    assert len(names(tmp_path / "x.gguf")) == 6
    lines = export_gguf(HERE / "ia3.safetensors", tmp_path / "y.gguf", model=str(tmp_path / "m"), cut=Cut(rank=2))
    assert len(lines) == 5


def test_a_base_that_is_not_named_and_a_file_that_is_there(model: str, tmp_path: Path) -> None:
    shaken(tiny_model("llama"), "lora", sites=["q_proj"]).save(tmp_path / "a")
    with pytest.raises(lorakit.BadParameter, match="does not name its base, whose configuration .* --model"):
        export_gguf(tmp_path / "a", tmp_path / "x.gguf")
    with pytest.raises(lorakit.BadParameter, match="cannot read the configuration"):
        export_gguf(tmp_path / "a", tmp_path / "x.gguf", model=str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(lorakit.CheckpointError, match="exists; give another --out"):
        export_gguf(tmp_path / "a", tmp_path / "x.gguf", model=model)
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"


def test_an_encoder_without_a_head_is_a_base_of_a_file(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "clip")
    model = base_for(HERE / "clip.safetensors", str(tmp_path / "clip"))
    assert len(load_adapter(HERE / "clip.safetensors", model=model).sites) == 4
    assert base_for(HERE / "clip.safetensors", None) is None
    with pytest.raises(lorakit.BadParameter, match="cannot load a causal-lm model"):
        any_model(str(tmp_path))


def test_a_file_says_nothing_of_its_base_and_is_not_read_for_it() -> None:
    assert recorded(HERE / "glora.safetensors") == {}, "reading it would need the base"


def test_the_seed_of_the_fixtures() -> None:
    """The fixtures were made beside this very base."""
    assert torch.equal(base("locon").get_parameter("lm_head.weight"), base("loha").get_parameter("lm_head.weight"))
