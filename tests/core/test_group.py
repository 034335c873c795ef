"""Adapted modules of one input go through the fused function together, whatever calls them in which order."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import Adapted, attach, get_method
from lorakit.core import layer
from lorakit.core.layer import Slot
from tests.laws.subject import awaken, base, batch, far, loss_of, subject


def groups(model: nn.Module) -> set[tuple[str, ...]]:
    """Last names of the members of every group of more than one."""
    slots = [m for m in model.modules() if isinstance(m, Slot)]
    return {tuple(member.path.rpartition(".")[2] for member in slot.group.slots) for slot in slots if slot.group is not None}


def calls(adapted: Adapted, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> list[int]:
    """How many layers went through together, in each call of a forward."""
    found: list[int] = []
    own = layer.lora_linear
    monkeypatch.setattr(layer, "lora_linear", lambda x, layers: (found.append(len(layers)), own(x, layers))[1])
    adapted.model(input_ids=ids)
    return found


def test_queries_keys_and_values_and_gate_and_up_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = subject("lora")
    assert groups(adapted.model) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert calls(adapted, monkeypatch, batch()) == [3, 1, 2, 1] * adapted.model.config.num_hidden_layers


def test_only_adapted_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(subject("lora", sites="qv"), monkeypatch, batch()) == [2] * 2
    assert groups(subject("lora", sites=["q_proj", "up_proj"]).model) == set()


def test_an_adapter_of_some_of_them_beside_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = subject("lora")
    adapted.add("few", get_method("lora", r=2, sites="qv"))
    assert calls(adapted, monkeypatch, batch()) == [2] * 2
    assert calls(adapted.switch("default"), monkeypatch, batch()) == [3, 1, 2, 1] * 2
    assert calls(adapted.switch("default", "few"), monkeypatch, batch()) == [1, 1, 2, 1] * 2  # where two are active, neither is fused


def test_cross_attention_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = attach(base("t5"), get_method("lora", r=2, sites="attention"))
    paths = {slot.path for slot in adapted.model.modules() if isinstance(slot, Slot) and slot.group is not None}
    assert paths and not any("EncDec" in path for path in paths)


def other_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * 1, *args[1:])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_member_that_is_given_another_input_computes_alone_and_alike(checkpointing: bool) -> None:
    """Also in recomputation, which must keep what forward kept."""
    found = []
    for watched in (False, True):
        adapted = awaken(attach(base(), get_method("lora", r=2)))
        if checkpointing:
            adapted.model.activation_checkpointing_enable({"use_reentrant": False})
        if watched:
            for name, module in adapted.model.named_modules():
                if name.endswith("k_proj"):
                    module.register_forward_pre_hook(other_input)
        loss = loss_of(adapted.model.train(), batch())
        found.append(torch.autograd.grad(loss, [p.tensor for p in adapted.params()]))
    assert all(far(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_an_encoder_decoder_trains_under_activation_checkpointing() -> None:
    model = base("t5")
    adapted = awaken(attach(model, get_method("lora", r=2)))
    model.activation_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        loss_of(model.train(), batch()).backward()
    assert all(p.tensor.grad is not None for p in adapted.params())


def test_nothing_is_left_behind() -> None:
    """After a forward, and after one that failed on its way: copies are made as ever."""
    adapted = subject("lora")
    groups_of = [slot.group for slot in adapted.model.modules() if isinstance(slot, Slot) and slot.group is not None]
    loss_of(adapted.model.train(), batch()).backward()
    assert groups_of and all(group.left is None for group in groups_of)
    copied = copy.deepcopy(adapted.model)
    attention, twin = (model.model.layers[0].self_attn for model in (adapted.model, copied))
    assert twin.q_proj.lora.group.slots[1] is twin.k_proj.lora is not attention.k_proj.lora
    attention.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        loss_of(adapted.model, batch())
    assert all(group.left is None for group in groups_of)
    pickle.dumps(adapted.model.model.layers[1])


def fail(*_: Any) -> None:
    raise KeyError("failed")


def test_modules_called_one_by_one_are_on_their_own() -> None:
    """Each with a backward of its own, and whatever was written in between."""
    adapted = subject("lora")
    modules = [b.host.module for b in adapted.branches() if b.site.name.startswith("model.layers.0.self_attn")][:3]
    x = torch.randn(2, 32)
    for module in modules:
        module(x).sum().backward()
        with torch.no_grad():
            x.add_(1)
    with torch.no_grad():
        k = next(b for b in adapted.branches() if b.site.name.endswith("0.self_attn.k_proj"))
        assert far(modules[1](x), x @ (k.base.dense() + k.weight()).T) < 1e-5


def test_detaching_takes_the_hooks_away() -> None:
    model = base()
    attach(model, get_method("lora", r=2)).detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
