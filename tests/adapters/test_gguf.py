"""A GGUF LoRA, read back with gguf's own reader; the order of rows against Transformers' reader of GGUF models, names against llama.cpp's.

LLAMA_CPP=<a checkout of llama.cpp> also compares whole files with those of its convert_lora_to_gguf.py.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Conv1D, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

import lorakit
from lorakit.adapters.convert import convert
from lorakit.adapters.gguf import ARCHITECTURES, Written, architecture, tensor_names, to_gguf
from lorakit.core.adapter import Adapter
from tests.adapters.subject import shaken, tiny_model

TINY = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gpt2", "gpt_neox", "gpt_oss")
NAMES = {"gpt2": "blk.0.attn_qkv.weight", "gpt_neox": "blk.0.attn_qkv.weight"}

QKV = {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
ATTENTION = QKV | {"self_attn.o_proj": "attn_output"}
USUAL = ATTENTION | {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
FUSED = {"query_key_value": "attn_qkv", "dense": "attn_output"}
UP = {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
PHI3 = {"self_attn.qkv": "attn_qkv", "self_attn.o": "attn_output", "mlp.gate_up": "ffn_up", "mlp.down": "ffn_down"}
STORED: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("llama", USUAL),
    "mistral": ("llama", USUAL),
    "mixtral": ("llama", ATTENTION),
    "qwen2": ("qwen2", USUAL),
    "qwen3": ("qwen3", USUAL),
    "qwen3_moe": ("qwen3moe", ATTENTION),
    "gemma": ("gemma", USUAL),
    "gemma2": ("gemma2", USUAL),
    "gemma3_text": ("gemma3", USUAL),
    "phi": ("phi2", QKV | {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}),
    "phi3": ("phi3", {f"{x}_proj": y for x, y in PHI3.items()}),
    "gpt2": ("gpt2", {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "gpt_neox": ("gptneox", {f"attention.{x}": y for x, y in FUSED.items()} | UP),
    "gpt_oss": ("gpt-oss", ATTENTION),
    "bloom": ("bloom", {f"self_attention.{x}": y for x, y in FUSED.items()} | UP),
    "granite": ("granite", USUAL),
    "olmo2": ("olmo2", USUAL),
    "smollm3": ("smollm3", USUAL),
    "starcoder2": ("starcoder2", ATTENTION | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
}
"""Of every architecture: general.architecture, and what llama.cpp's own converter calls the linear weights of a layer."""


def opened(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, tensors) of a file."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


def deltas(path: Path) -> dict[str, Tensor]:
    """ΔW by name, as llama.cpp computes it: alpha / rank with the rank of lora_b, no alpha as 1."""
    facts, tensors = opened(path)
    alpha = facts["adapter.lora.alpha"]
    found = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        A, B = (torch.from_numpy(tensors[f"{name}.lora_{x}"].copy()).double() for x in "ab")
        found[name] = (alpha / B.shape[1] if alpha else 1.0) * B @ A
    return found


def made(arch: str, **kwargs: Any) -> tuple[Adapter, dict[str, Any]]:
    model = tiny_model(arch)
    adapted = shaken(model, kwargs.pop("method", "lora"), **{"sites": "linear-modules", "r": 3, "alpha": 5.0, **kwargs})
    return adapted.state(), model.config.to_dict()


def written(tmp_path: Path, arch: str, **kwargs: Any) -> tuple[Written, Adapter, dict[str, Any]]:
    adapter, config = made(arch, **kwargs)
    return to_gguf(adapter, tmp_path / "x.gguf", config=config, name="mine"), adapter, config


def small(arch: str) -> PreTrainedModel:
    """The tiny model of that kind, or Transformers' own in that size."""
    if arch in TINY:
        return tiny_model(arch)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    own = {"n_layer": 2, "n_head": 4} if arch == "bloom" else {"num_key_value_heads": 4 if arch == "phi" else 2, "num_local_experts": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes, **own, **ids))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_are_those_of_llama_cpps_converter(arch: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small(arch).config)
    config = model.config.to_dict()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and ".1." in name]
    linear = [name for name in linear if not name.endswith(("mlp.gate", "mlp.router"))]
    kind, wanted = STORED[arch]
    found = tensor_names(architecture(config), config, linear)
    assert {name.partition(".1.")[2]: gg for name, gg in found.items()} == {name: f"blk.1.{gg}.weight" for name, gg in wanted.items()}
    assert gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture(config).name]] == kind


def test_rows_that_are_turned() -> None:
    B = torch.arange(12)[:, None]
    turned = {
        ".q_proj": [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11],
        ".k_proj": [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11],
        ".query_key_value": [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11],
    }
    halves, apart = {".q_proj", ".k_proj"}, {".query_key_value"}
    of = {"llama": halves, "mistral": halves, "mixtral": halves, "granite": halves, "smollm3": halves, "gpt_neox": apart, "bloom": apart}
    for arch, kind in ARCHITECTURES.items():
        assert set(kind.turns) == of.get(arch, set())
        config = {"n_head": 2} if arch == "bloom" else {"num_attention_heads": 2, "num_key_value_heads": 1}
        assert {end: turn(B, config)[:, 0].tolist() for end, turn in kind.turns.items()} == {end: turned[end] for end in kind.turns}


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - {"gpt2"}))  # llama.cpp refuses what its converter makes of gpt2's
def test_the_same_file_as_llama_cpps_converter(arch: str, tmp_path: Path) -> None:
    model = small(arch)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    adapted = shaken(model, "lora", sites=[f"*{end}" for end in STORED[arch][1]], r=3, alpha=5.0)
    adapted.save(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "peft", model=model)
    script = Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py"
    words = [sys.executable, script, "--base", tmp_path / "base", "--outfile", tmp_path / "theirs.gguf", tmp_path / "peft"]
    subprocess.run(words, check=True, capture_output=True, text=True)
    to_gguf(adapted.state(), tmp_path / "ours.gguf", config=model.config.to_dict(), name="x")
    (theirs, a), (ours, b) = (opened(tmp_path / f"{name}.gguf") for name in ("theirs", "ours"))
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert theirs[key] == ours[key]
    assert set(a) == set(b)
    assert [name for name, values in a.items() if values.dtype != b[name].dtype or not np.array_equal(values, b[name])] == []


@pytest.mark.parametrize("arch", TINY)
def test_metadata_names_shapes_and_values(arch: str, tmp_path: Path) -> None:
    found, adapter, config = written(tmp_path, arch)
    facts, tensors = opened(found.path)
    assert (facts["general.type"], facts["adapter.type"], facts["general.name"]) == ("adapter", "lora", "mine")
    assert facts["adapter.lora.alpha"] == 5.0
    assert facts["general.architecture"] == found.architecture == STORED[arch][0]
    assert len(tensors) == 2 * len(adapter.sites)
    assert NAMES.get(arch, "blk.0.attn_q.weight") + ".lora_a" in tensors
    turned = back(arch, deltas(found.path), config)
    wanted = {name: delta.weight().double() for name, delta in adapter.deltas().items()}
    names = dict(zip(wanted, named(arch, list(wanted)), strict=True))
    assert set(names.values()) == set(turned)
    for site, delta in wanted.items():
        torch.testing.assert_close(turned[names[site]], delta, atol=1e-6, rtol=1e-6)
    shapes = {t.name: tuple(t.shape) for t in gguf.GGUFReader(found.path).tensors}
    site = adapter.sites[0]
    assert shapes[f"{names[site.name]}.lora_a"] == (site.d_in, 3), "ne is the shape turned over: what llama.cpp checks against W's"
    assert shapes[f"{names[site.name]}.lora_b"] == (3, site.d_out)


def named(arch: str, modules: list[str]) -> list[str]:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[arch].name], 2)
    return [f"{table.get_name(module)}.weight" for module in modules]


def back(arch: str, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """With rows in the order of the Transformers model."""
    if ARCHITECTURES[arch].name == "LLAMA":
        oracle = LlamaTensorProcessor(config=config)
        return {name: torch.from_numpy(oracle.process(delta.numpy(), name).weights.copy()) for name, delta in found.items()}
    if arch == "gpt_neox":
        n = config["num_attention_heads"]
        parts = {name: delta.reshape(3, n, -1, delta.shape[1]) for name, delta in found.items() if "attn_qkv" in name}
        return found | {
            name: torch.stack([torch.cat([p[k, h] for k in range(3)]) for h in range(n)]).flatten(0, 1) for name, p in parts.items()
        }
    return found


def test_rows_of_q_and_k_are_really_turned(tmp_path: Path) -> None:
    found, adapter, config = written(tmp_path, "llama")
    wanted = {name: delta.weight().double() for name, delta in adapter.deltas().items()}
    raw = deltas(found.path)
    for part, heads in (("q", config["num_attention_heads"]), ("k", config["num_key_value_heads"])):
        delta, got = wanted[f"model.layers.0.self_attn.{part}_proj"], raw[f"blk.0.attn_{part}.weight"]
        half = len(delta) // heads // 2
        torch.testing.assert_close(got[1], delta[half], atol=1e-6, rtol=1e-6)  # row 1 of a head is the first of its second half
        torch.testing.assert_close(got[2 * half], delta[2 * half], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(raw["blk.0.attn_v.weight"], wanted["model.layers.0.self_attn.v_proj"], atol=1e-6, rtol=1e-6)


def test_ranks_and_scales_of_their_own(tmp_path: Path) -> None:
    adapter, config = made("qwen2", rank_pattern={"q_proj": 2, "down_proj": 1}, alpha_pattern={"k_proj": 0.25, "up_proj": 0.0})
    found = to_gguf(adapter, tmp_path / "x.gguf", config=config)
    raw, wanted = deltas(found.path), {name: delta.weight().double() for name, delta in adapter.deltas().items()}
    assert found.error < 1e-6
    kept = {name: delta for name, delta in wanted.items() if delta.any()}
    assert len(kept) == len(wanted) - 2, "an update of zero is not written: up_proj"
    for name, gg in zip(kept, named("qwen2", list(kept)), strict=True):
        torch.testing.assert_close(raw[gg], kept[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["pissa", "rslora", "vera", "adalora", "krona"])
def test_every_method_with_factors(method: str, tmp_path: Path) -> None:
    adapted = shaken(tiny_model("qwen3"), method, sites=["o_proj", "gate_proj"])
    adapter = adapted.state()
    to_gguf(adapter, tmp_path / "x.gguf", config=adapted.model.config.to_dict())
    wanted = {name: delta.weight().double() for name, delta in adapter.deltas().items()}
    raw = deltas(tmp_path / "x.gguf")
    for name, gg in zip(wanted, named("qwen3", list(wanted)), strict=True):
        torch.testing.assert_close(raw[gg], wanted[name], atol=1e-5, rtol=1e-5)


def test_parts_of_a_fused_weight(tmp_path: Path) -> None:
    adapter, config = made("gpt2", sites=["c_attn[q]", "c_attn[v]"])
    with pytest.raises(lorakit.NotExportable, match=r"give the model \(--model\)"):
        to_gguf(adapter, tmp_path / "x.gguf", config=config)
    to_gguf(adapter, tmp_path / "x.gguf", config=config, model=tiny_model("gpt2"))
    got = deltas(tmp_path / "x.gguf")["blk.1.attn_qkv.weight"]
    parts = adapter.deltas()
    q, v = (parts[f"transformer.h.1.attn.c_attn[{x}]"].weight().double() for x in "qv")
    torch.testing.assert_close(got, torch.cat([q, torch.zeros_like(q), v]), atol=1e-6, rtol=1e-6)


def test_half_precision_says_its_error(tmp_path: Path) -> None:
    adapter, config = made("llama")
    found = to_gguf(adapter, tmp_path / "x.gguf", config=config, dtype="float16")
    _, tensors = opened(found.path)
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    turned = back("llama", deltas(found.path), config)
    wanted = {name: delta.weight().double() for name, delta in adapter.deltas().items()}
    lost = sum(float((turned[gg] - wanted[n]).norm() ** 2) for n, gg in zip(wanted, named("llama", list(wanted)), strict=True))
    whole = sum(float(d.norm() ** 2) for d in wanted.values())
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert "from rounding" in found.lines()[0]
    big = {k: t * 1e6 for k, t in adapter.tensors.items()}
    with pytest.raises(lorakit.NotExportable, match="too large for float16"):
        to_gguf(Adapter(adapter.recipe, adapter.sites, big), tmp_path / "y.gguf", config=config, dtype="float16")
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.parametrize(
    ("arch", "kwargs", "config", "said"),
    [
        ("llama", {}, {"model_type": "bert"}, r"'bert' is not known here.*known are llama, mistral.*--to merged"),
        ("llama", {"method": "dora"}, {}, r"dora rescales W itself.*--to merged keeps all of it, and --rank R"),
        ("llama", {"unfreeze": ("norm",)}, {}, r"trained \d+ whole parameters"),
        ("llama", {"sites": ["embed_tokens"]}, {}, r"embed_tokens is an embedding"),
        ("llama", {"sites": ["lm_head"]}, {}, r"lm_head is the head"),
        ("mixtral", {"sites": ["down_proj"]}, {}, r"down_proj is experts"),
        ("llama", {"alpha": 0.0}, {}, "the adapter changes nothing"),
        ("llama", {}, {"num_hidden_layers": 1}, r"with 1 layers has no weight model\.layers\.1"),
        ("llama", {}, {"num_hidden_layers": None}, "has no num_hidden_layers"),
        ("llama", {}, {"num_attention_heads": 5}, "not 5 heads of an even size"),
        ("gpt_neox", {}, {"model_type": "qwen2"}, "llama.cpp's qwen2 with 2 layers has no weight gpt_neox"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(arch: str, kwargs: dict, config: dict, said: str, tmp_path: Path) -> None:
    adapter, own = made(arch, **kwargs)
    with pytest.raises(lorakit.LorakitError, match=said):
        to_gguf(adapter, tmp_path / "x.gguf", config={**own, **config})
    assert list(tmp_path.iterdir()) == []


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, adapter, config = written(tmp_path, "llama")
    before = found.path.read_bytes()
    with pytest.raises(lorakit.CheckpointError, match="exists; give another --out"):
        to_gguf(adapter, found.path, config=config)
    assert found.path.read_bytes() == before
    with pytest.raises(lorakit.BadParameter, match="expected float32 or float16"):
        to_gguf(adapter, tmp_path / "y.gguf", config=config, dtype="int8")

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(lorakit.CheckpointError, match="No space left"):
        to_gguf(adapter, tmp_path / "y.gguf", config=config)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, config = made("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(lorakit.MissingExtra, match=r"lorakit\[gguf\]"):
        to_gguf(adapter, tmp_path / "x.gguf", config=config)


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    adapter, config = made("llama")
    for name in "ab":
        to_gguf(adapter, tmp_path / name, config=config)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
