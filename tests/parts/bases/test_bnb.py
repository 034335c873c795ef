"""bitsandbytes' entries of a state dict, read and written."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lorakit import CheckpointError, quantize
from lorakit.data.tiny import tiny_model
from lorakit.parts.bases import bnb
from lorakit.parts.bases.matmul import nf4_dense
from lorakit.parts.bases.nf4_base import NF4Spec
from lorakit.parts.bases.packed import Layout, Packed
from tests.laws.subject import same_bits
from tests.parts.bases.oracle import bitsandbytes, weight

KEYS = ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", bnb.STATE]


def theirs(shape: tuple[int, int], *, dtype: torch.dtype = torch.float32, double_quant: bool = True) -> dict[str, Tensor]:
    """The entries of a Linear4bit's weight."""
    how = {"compress_statistics": double_quant, "quant_type": "nf4"}
    module = bitsandbytes().nn.Linear4bit(shape[1], shape[0], bias=False, **how)
    module.weight = bitsandbytes().nn.Params4bit(weight(*shape, dtype=dtype), requires_grad=False, blocksize=64, **how)
    return dict(module.to("cpu").state_dict())


def decoded(packed: Packed, layout: Layout) -> Tensor:
    return nf4_dense(*packed, layout.d_out, layout.d_in, layout.dtype, layout.blocksize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(128, 256), (64, 96), (7, 13)])
def test_what_it_wrote_is_read_and_written_again_bit_for_bit(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    entries = theirs(shape, dtype=dtype, double_quant=double_quant)
    packed, layout = bnb.read(entries, "here")
    assert layout == Layout(*shape, dtype, 64, double_quant)
    again = bnb.write(packed, layout)
    assert list(again) == [k for k in KEYS if double_quant or "nested" not in k]
    assert again.keys() == entries.keys()
    assert all(same_bits(again[k], entries[k]) for k in entries)


def check_it_reads_ours(write: Callable[[Packed, Layout], dict[str, Tensor]], *, double_quant: bool = True) -> None:
    layout = Layout(96, 128, torch.bfloat16, 64, double_quant)
    packed = Packed.of(weight(96, 128, dtype=torch.bfloat16), layout)
    entries = write(packed, layout)
    functional = bitsandbytes().functional
    state = functional.QuantState.from_dict({k.removeprefix("weight."): v for k, v in entries.items() if k != "weight"}, device="cpu")
    assert torch.equal(functional.dequantize_4bit(entries["weight"], state), decoded(packed, layout))


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_written_here_is_read_and_decoded_by_it_to_the_same_bits(double_quant: bool) -> None:
    check_it_reads_ours(bnb.write, double_quant=double_quant)


def test_mutants_of_the_layout_are_seen() -> None:
    def without_offset(packed: Packed, layout: Layout) -> dict[str, Tensor]:
        nested = packed.nested.clone()
        nested[-1] = 0
        return bnb.write(packed._replace(nested=nested), layout)

    def other_dtype(packed: Packed, layout: Layout) -> dict[str, Tensor]:
        return bnb.write(packed, Layout(layout.d_out, layout.d_in, torch.float16))

    def turned(packed: Packed, layout: Layout) -> dict[str, Tensor]:
        return bnb.write(packed, Layout(layout.d_in, layout.d_out, layout.dtype))

    for mutant in (without_offset, other_dtype, turned):
        with pytest.raises((AssertionError, RuntimeError)):
            check_it_reads_ours(mutant)


def test_another_storage_dtype_holds_the_same_bytes() -> None:
    entries = theirs((64, 128))
    entries["weight"] = entries["weight"].view(-1).view(torch.bfloat16)[:, None]
    packed, layout = bnb.read(entries, "here")
    assert torch.equal(decoded(packed, layout), decoded(*bnb.read(theirs((64, 128)), "here")))


def facts(entries: dict[str, Tensor], **changed: Any) -> dict[str, Tensor]:
    found = json.loads(bytes(entries[bnb.STATE].tolist())) | changed
    return entries | {bnb.STATE: torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)}


def test_what_is_something_else_or_damaged_is_refused_by_name() -> None:
    good = bnb.write(Packed.of(weight(64, 128), at := Layout(64, 128, torch.float32)), at)
    damaged = {
        "no weight.quant_state": {k: v for k, v in good.items() if k != bnb.STATE},
        "cannot be read": good | {bnb.STATE: torch.tensor([1, 2, 3], dtype=torch.uint8)},
        "is not NF4": facts(good, quant_type="fp4"),
        "is not NF4 in": facts(good, nested_blocksize=128),
        "another table": good | {"weight.quant_map": good["weight.quant_map"] * 2},
        "weight.nested_quant_map is missing": {k: v for k, v in good.items() if k != "weight.nested_quant_map"},
        "weight needs": good | {"weight": good["weight"][:-1]},
        "weight.absmax has": good | {"weight.absmax": good["weight.absmax"][:-1]},
        "weight.nested_absmax has": good | {"weight.nested_absmax": torch.ones(3)},
    }
    for message, entries in damaged.items():
        with pytest.raises(CheckpointError, match=f"layer.weight.*{message}"):
            bnb.read(entries, "layer.weight")


def test_bits_a_parameter_in_the_file() -> None:
    """4.127 bits of codes and scales; what bitsandbytes writes besides are tables of a fixed size a weight."""
    model = nn.Module()
    model.layer = nn.Linear(1024, 768, bias=False)
    holder = nn.ModuleDict({"q_proj": model.layer})
    entries = quantize(holder, NF4Spec(sites="q_proj")).state_dict()
    file = safetensors.torch.load(safetensors.torch.save(entries))
    payload = sum(v.nbytes for k, v in file.items() if k.split(".", 1)[1] in ("weight", "weight.absmax", "weight.nested_absmax"))
    assert 8 * payload / (1024 * 768) == pytest.approx(4.127, abs=1e-3)
    tables = sum(v.nbytes for v in file.values()) - payload
    assert tables < 1300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "sizes"), [("llama", {"hidden_size": 64, "intermediate_size": 128}), ("gpt2", {"n_embd": 64})])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_saved_model_is_loaded_by_transformers_and_bitsandbytes_and_says_the_same(
    arch: str, sizes: dict[str, int], double_quant: bool, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    bitsandbytes()
    model = quantize(tiny_model(arch, **sizes), NF4Spec(double_quant))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).train()  # never in eval mode: it would repack itself
    ours, found = model.state_dict(), theirs.state_dict()
    assert ours.keys() == found.keys()
    assert all(same_bits(ours[k], found[k]) for k in ours)
    ids = torch.arange(3, 19)[None]
    assert torch.equal(theirs(input_ids=ids).logits, model.train()(input_ids=ids).logits)
    back = quantize(tiny_model(arch, seed=1, **sizes), NF4Spec(double_quant))  # type: ignore[arg-type]
    back.load_state_dict(found)
    assert torch.equal(back.train()(input_ids=ids).logits, theirs(input_ids=ids).logits)
