"""Adapted modules of one input go through the fused function together, whatever calls them in which order."""

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
    return {tuple(member.path.rpartition(".")[2] for member in slot.group) for slot in slots if len(slot.group) > 1}


def calls(adapted: Adapted, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> list[int]:
    """How many layers went through together, in each call of a forward."""
    found: list[int] = []
    own = layer.lora_linear
    monkeypatch.setattr(layer, "lora_linear", lambda x, layers: (found.append(len(layers)), own(x, layers))[1])
    with torch.no_grad():
        adapted.model(input_ids=ids, **({"decoder_input_ids": ids} if adapted.model.config.is_encoder_decoder else {}))
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
    paths = {slot.path for slot in adapted.model.modules() if isinstance(slot, Slot) and len(slot.group) > 1}
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


def test_nothing_is_left_behind_after_a_forward() -> None:
    adapted = subject("lora")
    loss_of(adapted.model.train(), batch()).backward()
    assert all(slot.ready is None for slot in adapted.model.modules() if isinstance(slot, Slot))


def test_an_output_of_another_state_is_not_taken() -> None:
    """What q's forward left for k is not k's output once something was written into k's adapter, or into x."""
    adapted = subject("lora")
    q, k = (next(b for b in adapted.branches() if b.site.name.endswith(name)) for name in ("0.self_attn.q_proj", "0.self_attn.k_proj"))
    for write in ("adapter", "x", "nothing"):
        x = torch.randn(2, 32)
        with torch.no_grad():
            q.host.module(x)
            left = k.host.module.lora.ready
            if write == "adapter":
                k.delta.B.add_(1)
            elif write == "x":
                x.add_(1)
            y = k.host.module(x)
            assert (y is left.y) == (write == "nothing")
            assert far(y, x @ (k.base.dense() + k.weight()).T) < 1e-5
