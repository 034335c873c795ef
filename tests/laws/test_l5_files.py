"""L5: save and load give the same tensors and logits; what exports to PEFT loads in the real PEFT with equal logits."""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit import NotExportable, list_methods
from lorakit.adapters.peft import to_peft
from tests.laws.subject import base, batch, dense, far, logits, same_bits, subject

PLACES = (("llama", ["all-linear", "embedding"], ()), ("gpt2", ["c_attn[q]", "c_attn[v]", "mlp"], ()), ("bert", "attention", ("cls",)))


def check_L5(name: str) -> None:
    for arch, sites, unfreeze in PLACES:
        adapted = subject(name, arch, sites=sites, unfreeze=unfreeze)
        want, tensors = logits(adapted.model, batch()), adapted.tensors("default")
        with tempfile.TemporaryDirectory() as folder:
            adapted.save(folder)
            again = lorakit.load(base(arch), folder)
            files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
            with tempfile.TemporaryDirectory() as other:
                again.save(other)
                assert {p.name: p.read_bytes() for p in Path(other).iterdir()} == files, "saving what was loaded changes the files"
        found = again.tensors("default")
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[k], tensors[k]) for k in tensors)
        assert same_bits(logits(again.model, batch()), want)
        assert [p.name for p in again.params()] == [p.name for p in adapted.params()]
        assert all(p.tensor.requires_grad for p in again.params()), "a loaded adapter can be trained on"
        assert not again.model.training


def check_L5_peft(name: str) -> None:
    """What has an exact form in PEFT gives the same logits in PEFT itself; what has none says so."""
    peft = pytest.importorskip("peft")
    for arch, sites in (("llama", "all-linear"), ("llama", ["q_proj", "embedding"]), ("gpt2", ["c_attn[q]", "mlp"])):
        adapted = subject(name, arch, sites=sites, whole="embedding" not in sites)
        want = logits(adapted.model, batch())
        with tempfile.TemporaryDirectory() as folder:
            try:
                exported = to_peft(adapted.state(), folder, model=dense(base(arch), adapted.methods["default"]))
            except NotExportable:
                plain = adapted.branches() and adapted.methods["default"].beyond is None
                if plain and all((f := b.factors()) is not None and f.gain is None for b in adapted.branches()):
                    raise AssertionError(f"{name} is s·B·A at every site and cannot be exported") from None
                continue
            assert exported.total == 0
            with warnings.catch_warnings(action="ignore"):  # of adapted embeddings and Conv1D
                model = dense(base(arch), adapted.methods["default"])
                model.config.use_cache = False  # X-LoRA there has no cache
                theirs = peft.PeftModel.from_pretrained(model, folder).eval()
        assert far(logits(theirs, batch()), want) < 1e-5, arch


@pytest.mark.parametrize("name", list_methods())
def test_L5_in_peft(name: str) -> None:
    check_L5_peft(name)


@pytest.mark.parametrize("name", list_methods())
def test_L5(name: str) -> None:
    check_L5(name)


def test_another_base_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject("lora").save(folder)
        with pytest.raises(lorakit.AdapterMismatch, match="--force"):
            lorakit.load(base(seed=1), folder)
        assert torch.isfinite(logits(lorakit.load(base(seed=1), folder, force=True).model, batch())).all()
