"""The attention interface as patches use it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from lorakit import Incompatible, attach, get_method
from lorakit.core.context import Cell
from lorakit.parts.patches import attention, masks
from lorakit.parts.patches.attention import AttentionPatch, Call, Onward, Out, attention_paths, projections
from tests.laws.subject import base, batch, far, is_encoder_decoder, same_bits

ARCHS = ("llama", "mistral", "qwen3", "mixtral", "gpt_neox", "gpt2", "bert", "roberta", "t5")


class Through(AttentionPatch):
    """Changes nothing; `explicit` makes the mask that is only implied."""

    def __init__(self, model: nn.Module, *, acting: bool = True, explicit: bool = False) -> None:
        super().__init__(model, attention_paths(model), Cell())
        self.acting, self.explicit, self.calls = acting, explicit, list[int]()

    def acts(self, call: Call) -> bool:
        return self.acting

    def attend(self, call: Call, onward: Onward, at: int) -> Out:
        self.calls.append(at)
        return onward(call.masked(call.explicit()) if self.explicit else call)


def out(model: nn.Module, mask: torch.Tensor | None = None) -> torch.Tensor:
    more = {"decoder_input_ids": batch()} if is_encoder_decoder(model) else {}
    with torch.no_grad():
        return model(input_ids=batch(), attention_mask=mask, **more).logits


def padded() -> torch.Tensor:
    mask = torch.ones_like(batch())
    mask[1, 4:] = 0
    return mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_patch_that_changes_nothing_changes_no_bit_and_an_explicit_mask_no_digit(arch: str, implementation: str) -> None:
    model = base(arch, attn_implementation=implementation)
    for mask in (None, padded()):
        want = out(model, mask)
        for patch in (Through(model), Through(model, acting=False)):
            patch.install()
            assert same_bits(out(model, mask), want)
            patch.remove()
        assert not patch.calls
        patch = Through(model, explicit=True)
        patch.install()
        assert far(out(model, mask)[padded().bool()], want[padded().bool()]) < 1e-5
        assert sorted(set(patch.calls)) == list(range(len(patch.paths)))
        patch.remove()


def test_removing_gives_the_same_objects_back_in_any_order() -> None:
    model = base("llama")
    modules = [model.get_submodule(path) for path in attention_paths(model)]
    before = [(id(m.config), sorted(m.__dict__)) for m in modules]
    first, second = Through(model), Through(model)
    first.install(), second.install()
    assert model.config._attn_implementation == "sdpa", "the model's own config, from which its masks are made, stays"
    first.remove()
    out(model)
    assert not first.calls
    assert second.calls
    second.remove()
    assert [(id(m.config), sorted(m.__dict__)) for m in modules] == before


def test_the_later_patch_acts_first() -> None:
    model, order = base("llama"), list[str]()

    class Named(Through):
        def attend(self, call: Call, onward: Onward, at: int) -> Out:
            order.append(self.label)
            return onward(call)

    for label in "ab":
        patch = Named(model)
        patch.label = label
        patch.install()
    out(model)
    assert order[:2] == ["b", "a"]


def test_copies_carry_patches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base("llama")
    patch = Through(model)
    model.add_module("patch", patch)
    patch.install()
    want = out(model)
    copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    monkeypatch.delitem(AttentionInterface._global_mapping, attention.NAME)  # as in a process that has attached nothing
    for again in (pickle.loads(pickled), copied):
        again.patch.calls.clear(), patch.calls.clear()
        assert same_bits(out(again), want)
        assert again.patch.calls
        assert not patch.calls
        again.patch.remove()
        assert "lora_attention" not in again.model.layers[0].self_attn.__dict__
        assert "lora_attention" in model.model.layers[0].self_attn.__dict__


def test_the_implementation_may_change_while_patched() -> None:
    model = base("llama")
    want = out(model)
    patch = Through(model)
    patch.install()
    around = model.model.layers[0].self_attn.__dict__["lora_attention"]
    model.set_attn_implementation("eager")
    assert around.config._attn_implementation == "eager"
    assert far(out(model), want) < 1e-5
    assert not same_bits(out(model), want)


def test_projections_are_found_whole_and_in_fused_weights() -> None:
    assert {k: v.d_out for k, v in projections(base("llama"), "model.layers.0.self_attn").items()} == {"q": 32, "k": 16, "v": 16}
    assert {k: v.d_out for k, v in projections(base("gpt2"), "transformer.h.1.attn").items()} == {"q": 32, "k": 32, "v": 32}


def test_what_cannot_be_patched_is_refused_with_the_reason() -> None:
    with pytest.raises(Incompatible, match="no attention module"):
        attention_paths(nn.ModuleDict({"w": nn.Linear(3, 3)}))
    model = base("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Incompatible, match="attn_implementation='sdpa'"):
        Through(model).install()
    before = sorted(model.model.layers[0].self_attn.__dict__)
    with pytest.raises(Incompatible, match="attn_implementation='sdpa'"):
        attach(model, get_method("hiddenkey"))
    assert sorted(model.model.layers[0].self_attn.__dict__) == before
    assert not any("lora" in name for name, _ in model.named_modules())
    model = base("gpt2", attn_implementation="eager")
    model.config.reorder_and_upcast_attn = True
    with pytest.raises(Incompatible, match="upcasts"):
        Through(model).install()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(3, 3)

    with pytest.raises(Incompatible, match="attention interface"):
        Through(nn.ModuleDict({"attn": Own()})).install()


def test_a_mutant_that_forgets_that_no_mask_may_mean_causal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.Call, "explicit", lambda self: self.mask)
    with pytest.raises(AssertionError):
        test_a_patch_that_changes_nothing_changes_no_bit_and_an_explicit_mask_no_digit("llama", "sdpa")


def test_eager_attention_takes_bool_masks_of_patches_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base("llama", attn_implementation="eager")
    want = out(model)
    patch = Through(model)
    patch.install()
    monkeypatch.setattr(Through, "attend", lambda self, call, onward, at: onward(call.masked(masks.visible(call.mask))))
    assert far(out(model), want) < 1e-5
    monkeypatch.setattr(masks, "additive", lambda mask, dtype: mask)  # a mutant: a bool is added to the scores
    assert far(out(model), want) > 1e-3
