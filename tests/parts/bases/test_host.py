"""The module that holds a packed weight goes on being a module."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import CheckpointError, Incompatible, attach, get_method, quantize
from lorakit.core.base import base_of, expand, numel
from lorakit.core.fingerprint import fingerprint
from lorakit.data.tiny import tiny_model
from lorakit.parts.bases.host import held, packed_in
from lorakit.parts.bases.nf4_base import NF4, NF4Spec
from tests.laws.subject import batch, logits, same_bits
from tests.parts.bases.oracle import weight


def linear(kind: type = nn.Linear, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A host of 48 × 80."""
    module = (nn.Linear(80, 48, bias=bias) if kind is nn.Linear else Conv1D(48, 80)).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight(*module.weight.shape, std=1.0))
        if bias:
            module.bias.copy_(weight(48, std=1.0))
    return module


def put(module: nn.Module, **how: Any) -> NF4:
    NF4Spec(**how).store(module)
    base = base_of(module)
    assert isinstance(base, NF4)
    return base


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_its_forward_is_that_of_a_plain_module_with_the_decoded_weight(kind: type, dtype: torch.dtype) -> None:
    module = linear(kind, dtype=dtype)
    base = put(module)
    plain = linear(kind, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(base.dense() if kind is nn.Linear else base.dense().T)
    x = weight(2, 3, 80, dtype=dtype, std=1.0)
    close = {"rtol": 1e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}  # the bias is added to rounded sums
    torch.testing.assert_close(module(x), plain(x), **close)
    torch.testing.assert_close(base.matmul(x), x @ base.dense().T)
    torch.testing.assert_close(base.matmul_t(module(x)), module(x) @ base.dense())
    assert module(x).dtype == base.dtype == dtype
    assert base.shape == (48, 80)
    assert base.bias is module.bias


def test_under_autocast_it_computes_in_the_dtype_that_torch_s_own_would() -> None:
    module, plain = linear(), linear()
    base = put(module)
    with torch.no_grad():
        plain.weight.copy_(base.dense())
    x = weight(3, 80, std=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == plain(x).dtype == torch.bfloat16
        torch.testing.assert_close(module(x), plain(x), rtol=1e-2, atol=3e-2)
    assert module(x).dtype == torch.float32


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_leaving_gives_the_same_objects_back(kind: type) -> None:
    module = linear(kind)
    before, anatomy, bits = module.weight, sorted(module.__dict__), module.weight.detach().clone()
    undo = NF4Spec().store(module)
    assert module.weight.dtype == torch.uint8
    assert not module.weight.requires_grad
    assert isinstance(module, kind)
    undo()
    assert type(module) is kind
    assert module.weight is before
    assert same_bits(before.detach(), bits)
    assert sorted(module.__dict__) == anatomy
    assert not module._buffers
    assert not module._non_persistent_buffers_set


def test_casts_of_the_module_round_neither_codes_nor_scales() -> None:
    for double_quant in (True, False):
        module = linear()
        base = put(module, double_quant=double_quant)
        W = base.dense()
        module.to(torch.bfloat16)
        assert base.dtype == torch.bfloat16
        assert torch.equal(base.dense(), W.bfloat16())
        module.half().float()
        assert base.dtype == torch.float32
        assert torch.equal(base.dense(), W)


def test_it_can_be_copied_pickled_and_moved() -> None:
    model = quantize(tiny_model("gpt2"))
    want = logits(model, batch())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), model.to("cpu")):
        assert same_bits(logits(other, batch()), want)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_a_state_dict_is_read_back_packed_or_plain(arch: str) -> None:
    model = tiny_model(arch)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    packed = quantize(model).state_dict()
    want = logits(model, batch())
    for found in (packed, plain):
        other = quantize(tiny_model(arch, seed=1))
        other.load_state_dict(found)
        assert same_bits(logits(other, batch()), want)
        assert fingerprint(other).rows == (fingerprint(model).rows if found is plain else None), "packed, nobody knows from what"
    incomplete = {k: v for k, v in packed.items() if not k.endswith("absmax")}
    with pytest.raises((CheckpointError, KeyError, RuntimeError)):
        quantize(tiny_model(arch)).load_state_dict(incomplete)


def test_a_state_dict_of_another_shape_or_kind_is_refused() -> None:
    ours, other = (nn.ModuleDict({"w": linear()}) for _ in range(2))
    quantize(ours, NF4Spec(sites="w"))
    with pytest.raises(CheckpointError, match="w.weight is .80, 48.; this module's weight is 48 × 80"):
        ours.load_state_dict({"w.weight": torch.zeros(80, 48), "w.bias": torch.zeros(48)})
    with pytest.raises(CheckpointError, match="blocksize=128"):
        ours.load_state_dict(quantize(other, NF4Spec(blocksize=128, sites="w")).state_dict())


def test_while_the_original_is_kept_a_state_dict_is_the_original_s() -> None:
    model = tiny_model("gpt2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = attach(model, get_method("qlora", r=2))
    found = {k: v for k, v in model.state_dict().items() if ".lora." not in k}
    assert found.keys() == before.keys()
    assert all(same_bits(found[k], before[k]) for k in before)
    other = tiny_model("gpt2", seed=1).state_dict()
    model.load_state_dict({k: other.get(k, v) for k, v in model.state_dict().items()})
    live = logits(model, batch())
    adapted.detach()
    assert all(same_bits(v, other[k]) for k, v in model.state_dict().items()), "the base was another one, and is given back"
    assert same_bits(logits(quantize(model), batch()), live)


def test_assigning_packs_again_and_is_undone() -> None:
    for kind in (nn.Linear, Conv1D):
        module = linear(kind)
        base = put(module)
        before, W = module.weight, base.dense()
        codes = before.detach().clone()
        base.assign_(W + weight(48, 80, seed=3, std=0.5))
        base.assign_(base.dense() * 1.7)
        assert packed_in(module) is not None
        assert (base.dense() - W).norm() > 0.1 * W.norm()
        base.restore_()
        assert module.weight is before
        assert torch.equal(before, codes)
        assert torch.equal(base.dense(), W)


def test_opened_it_holds_exactly_what_is_assigned() -> None:
    for kind in (nn.Linear, Conv1D):
        module = linear(kind)
        base = put(module)
        before, W, change = module.weight, base.dense(), weight(48, 80, seed=3, std=1e-3)
        x = weight(3, 80, std=1.0)
        base.open_()
        assert torch.equal(base.dense(), W)
        base.assign_(W + change)
        assert torch.equal(base.dense(), W + change)
        torch.testing.assert_close(module(x), x @ (W + change).T + module.bias)
        assert not torch.equal(module(x), x @ W.T + module.bias)
        base.restore_()
        assert module.weight is before
        assert torch.equal(base.dense(), W)
        base.assign_(W + change)
        assert not torch.equal(base.dense(), W + change), "closed again it packs"


def test_expanding_leaves_a_plain_module() -> None:
    model = quantize(tiny_model("gpt2"))
    total = numel(model)
    want = logits(model, batch())
    expand(model)
    assert not [m for m in model.modules() if hasattr(m, "nf4")]
    assert not hasattr(model, "quantized")
    assert not hasattr(model.config, "quantization_config")
    assert all(p.is_floating_point() for p in model.parameters())
    torch.testing.assert_close(logits(model, batch()), want)
    assert total == numel(model) == numel(tiny_model("gpt2"))


def test_other_storages_are_refused() -> None:
    module = linear()
    put(module)
    assert NF4Spec().store(module)() is None, "the same again is nothing to do or undo"
    assert packed_in(module) is not None
    for other in (NF4Spec(False), NF4Spec(blocksize=128)):
        with pytest.raises(Incompatible, match="blocksize 64 and double_quant True"):
            other.store(module)
    with pytest.raises(Incompatible, match="only plain linear weights"):
        NF4Spec().store(nn.Embedding(8, 8))


def test_what_it_knows_of_the_original_is_a_sample_only() -> None:
    model = quantize(tiny_model("llama"))
    for module in model.modules():
        if hasattr(module, "nf4"):
            assert held(module).original is None
            assert held(module).origin.numel() <= 256
