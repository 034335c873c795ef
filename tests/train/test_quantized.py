"""`quantize: nf4` for any method: trained, resumed, opened, scored, merged and packed again."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit import BadParameter, CheckpointError, Incompatible, NotMergeable, get_method, quantize
from lorakit.core.base import numel
from lorakit.data.tiny import tiny_model
from lorakit.parts.bases.nf4_base import NF4, NF4Spec
from lorakit.serve import merge as merge_module
from lorakit.serve.generate import complete
from lorakit.serve.merge import logits, merge, probes
from lorakit.serve.open import open_adapter
from lorakit.serve.score import score
from lorakit.train.distributed import world
from lorakit.train.dry_run import dry_run
from lorakit.train.run import Run
from lorakit.train.source_model import load_model, load_tokenizer
from lorakit.train.state import read_state
from lorakit.train.train import build, train
from tests.laws.subject import same_bits
from tests.train.runs import config, model_folder, text_file

LOUD = {"learning_rate": 5e-2, "max_steps": 8, "save_steps": 0, "lr_scheduler_type": "constant"}
NAMES = [{"method": "qlora"}, {"method": "dora", "quantize": "nf4"}, {"method": "lora", "quantize": "nf4", "dtype": "bfloat16"}]


def packed(model: torch.nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if getattr(type(m), "storage", None) is NF4 and not m.weight.is_floating_point()]


@pytest.mark.parametrize("keys", NAMES, ids=lambda keys: f"{keys['method']} {keys.get('dtype', '')}")
def test_what_was_trained_is_what_is_opened_scored_and_merged(tmp_path: Path, keys: dict[str, str]) -> None:
    settings = config(tmp_path, **LOUD | keys)
    final = train(settings, quiet=True).final
    folder = tmp_path / "out" / "adapter"
    opened = open_adapter(folder)
    assert len(packed(opened.model)) == 14
    assert not opened.adapted.notes
    assert all(m.nf4.original is None for m in opened.model.modules() if hasattr(m, "nf4"))
    assert score(opened, str(tmp_path / "data.jsonl"))["loss"] == pytest.approx(final["loss"], rel=1e-6)
    assert complete(opened, "abc", max_new_tokens=3) is not None
    wide = open_adapter(folder, dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(packed(wide.model), packed(opened.model), strict=True)), "the codes follow the cast"
    verdict = merge(folder, tmp_path / "merged")
    assert verdict is not None
    assert verdict.ok
    assert verdict.max_abs_diff < 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    close = 1e-3 if "dtype" not in keys else 1e-3 + 2 * verdict.rounding
    with torch.no_grad():
        assert all((logits(plain.eval(), ids) - logits(wide.model, ids)).abs().max() < close for ids in probes(wide))


def test_a_merge_from_other_codes_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the original weights come back while merging, as if the base had never been quantized."""
    train(config(tmp_path, **LOUD, method="qlora"), quiet=True)
    adapted = merge_module.open_adapter(tmp_path / "out" / "adapter").adapted
    assert adapted is not None
    original = tiny_model("llama", vocab_size=adapted.model.config.vocab_size)
    weights = {tuple(m.weight.shape): m.weight.detach() for m in original.modules() if isinstance(m, torch.nn.Linear)}
    real = NF4.open_
    monkeypatch.setattr(NF4, "open_", lambda self: (real(self), self.assign_(weights[self.shape]))[0])
    with pytest.raises(NotMergeable):
        merge(tmp_path / "out" / "adapter", tmp_path / "merged")


def test_packed_again_it_says_what_was_lost(tmp_path: Path) -> None:
    train(config(tmp_path, **LOUD, method="qlora"), quiet=True)
    folder = tmp_path / "out" / "adapter"
    verdict = merge(folder, tmp_path / "small", requantize=True)
    assert verdict is not None
    assert verdict.requantized
    assert verdict.max_abs_diff < 1e-3 < verdict.target_max_abs_diff
    facts = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert facts["bnb_4bit_quant_type"] == "nf4"
    assert facts["llm_int8_skip_modules"] == ["lm_head"]
    merge(folder, tmp_path / "large")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "large")]
    assert sizes[0] < 0.75 * sizes[1]
    train(config(tmp_path, **LOUD, method="lora", output_dir=str(tmp_path / "plain")), quiet=True)
    with pytest.raises(BadParameter, match="leave out --requantize"):
        merge(tmp_path / "plain" / "adapter", tmp_path / "no", requantize=True)


def test_a_run_is_resumed_to_the_bit(tmp_path: Path) -> None:
    settings = config(tmp_path, method="dora", quantize="nf4")
    train(settings, quiet=True)
    parts = build(settings, world())
    run = Run(parts.adapted, parts.data, settings, world(), out=None, quiet=True)
    run.load_state(read_state(tmp_path / "out" / "checkpoint-00000004"))
    run.train()
    whole = open_adapter(tmp_path / "out" / "adapter").adapted
    assert whole is not None
    found, want = parts.adapted.tensors("default"), whole.tensors("default")
    assert all(same_bits(found[k], want[k]) for k in want)


def test_the_original_weights_are_gone_and_the_preview_counts_what_the_codes_stand_for(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 512}
    model_folder(tmp_path / "model", **wide)
    previews = {how: dry_run(config(tmp_path, quantize=how)) for how in ("none", "nf4")}
    assert previews["nf4"].total_params == previews["none"].total_params
    linear = numel(tiny_model("llama", **wide)) - 2 * 128 * 128 - 5 * 128  # without embedding, head and norms
    saved = previews["none"].memory.weights - previews["nf4"].memory.weights
    assert saved == pytest.approx(linear * (4 - 4.127 / 8), rel=0.01)
    assert all(
        m.nf4.original is None for m in build(config(tmp_path, method="qlora"), world()).adapted.model.modules() if hasattr(m, "nf4")
    )


def test_a_method_with_another_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="give the same"):
        build(config(tmp_path, method="qlora", blocksize=128, quantize="nf4"), world())
    build(config(tmp_path, method="qlora", quantize="nf4"), world())
    with pytest.raises(BadParameter, match="quantize"):
        config(tmp_path, quantize="int4")
    assert get_method("qlora").base is not None


@pytest.mark.parametrize(("arch", "sizes"), [("llama", {}), ("gpt2", {}), ("llama", {"hidden_size": 48, "intermediate_size": 80})])
def test_a_packed_folder_is_read_to_the_same_codes_without_bitsandbytes(tmp_path: Path, arch: str, sizes: dict[str, int]) -> None:
    for double_quant in (True, False):
        model = quantize(tiny_model(arch, **sizes), NF4Spec(double_quant))  # type: ignore[arg-type]
        folder = tmp_path / str(double_quant)
        model.save_pretrained(folder)
        again = load_model(str(folder))
        assert all(same_bits(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        ids = torch.arange(3, 19)[None]
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert again.config.quantization_config == model.config.quantization_config
        assert again.quantized["dtype"] == "float32"


def test_a_run_on_a_packed_folder(tmp_path: Path) -> None:
    model_folder(tmp_path / "plain")
    model = quantize(load_model(str(tmp_path / "plain")))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(str(tmp_path / "plain")).save_pretrained(tmp_path / "model")
    settings = config(tmp_path, **LOUD | {"model": str(tmp_path / "model"), "train_data": text_file(tmp_path / "data.jsonl")})
    final = train(settings, quiet=True).final
    opened = open_adapter(tmp_path / "out" / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(packed(opened.model), packed(model), strict=True))
    assert score(opened, str(tmp_path / "data.jsonl"))["loss"] == pytest.approx(final["loss"], rel=1e-6)
    verdict = merge(tmp_path / "out" / "adapter", tmp_path / "merged")
    assert verdict is not None
    assert verdict.ok
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    for name in (tmp_path / "model").glob("*.safetensors"):
        name.write_bytes(b"")
    with pytest.raises((BadParameter, CheckpointError)):
        load_model(str(tmp_path / "model"))
