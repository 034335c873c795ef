"""Which models give up their logits for the hidden states, that the loss is then the same, and that nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.core.attach import attach
from lorakit.core.layer import Slot
from lorakit.core.method import get_method
from lorakit.data.tiny import ARCHITECTURES, tiny_model
from lorakit.ops import cross_entropy
from lorakit.train import head, metrics
from lorakit.train.head import head_and_hidden
from lorakit.train.metrics import forward_loss, forward_scored

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}


def batch_of(b: int = 3, t: int = 10, *, ignored: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (b, t), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(b):
        labels[row, : ignored * row] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """forward_loss gives what forward_scored gives."""
    loss, n = forward_loss(model, batch)
    found = gradients(model, loss)
    whole = forward_scored(model, batch)
    wanted = gradients(model, whole.loss)
    assert n == whole.n
    torch.testing.assert_close(loss, whole.loss, rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Wide(TorchDispatchMode):
    """The most rows of anything as wide as the vocabulary, 150, but for the head's own weight."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = [t.shape for t in tree_leaves(out) if isinstance(t, Tensor) and t.dim() > 1 and t.shape[-1] == 150]
        shapes = [] if func is torch.ops.aten.t.default else shapes
        self.rows = max([self.rows, *(shape[:-1].numel() for shape in shapes)])
        return out


@pytest.fixture
def four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS", 4)
    monkeypatch.setattr(cross_entropy, "CHUNK", {"cpu": 1})


# ---------------------------------------------------------------------------------------------------------- who takes the way
@pytest.mark.usefixtures("four_rows")
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a not in ("t5", "roberta")])
def test_logits_are_never_whole_and_the_loss_is_the_same(arch: str, ignored: int) -> None:
    model, batch = tiny_model(arch, vocab_size=150), batch_of(ignored=ignored)
    model.get_input_embeddings().requires_grad_(False)  # its gradient is as large as what is counted
    forward_loss(model, batch)  # the model is asked once
    with Wide() as seen:
        forward_loss(model, batch)
    assert seen.rows <= 4
    with Wide() as seen:
        forward_scored(model, batch)
    assert seen.rows >= 20
    agree(tiny_model(arch), batch)


@pytest.mark.parametrize("arch", ["llama", "bert"])  # bert's forward takes no logits_to_keep
def test_ignored_tokens_never_reach_the_head(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    count = metrics.head_loss
    monkeypatch.setattr(metrics, "head_loss", lambda h, top, y: rows.append(h.shape[:-1].numel()) or count(h, top, y))
    _, n = forward_loss(tiny_model(arch), batch_of(ignored=3))
    assert rows == [n] == [20]


@pytest.mark.usefixtures("four_rows")
def test_without_gradients_too() -> None:
    model, batch = tiny_model("llama", vocab_size=150), batch_of(ignored=2)
    forward_loss(model, batch)
    with torch.no_grad(), Wide() as seen:
        loss, _ = forward_loss(model, batch)
    assert seen.rows == 4
    torch.testing.assert_close(loss, forward_scored(model, batch).loss.detach(), rtol=1e-6, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(forward_loss(model, batch)[0], loss, rtol=1e-6, atol=0)


def banning(model: nn.Module) -> nn.Module:
    """A model that writes into its logits."""

    class Banning(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
            out = super().forward(input_ids=input_ids, **inputs)
            out.logits[..., 5] = -1e4
            return out

    model.__class__ = Banning
    return model


INDIRECT: dict[str, Callable[[], nn.Module]] = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SHAPE, logit_scale=0.3)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "written into": lambda: banning(tiny_model("llama")),
}


@pytest.mark.parametrize("kind", INDIRECT)
def test_models_that_change_their_logits_keep_them(kind: str) -> None:
    model, batch = INDIRECT[kind](), batch_of(ignored=2)
    calls: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(module))
    assert head_and_hidden(model, {"input_ids": batch["input_ids"]}) is None
    assert not calls  # asked without a forward
    agree(model, batch)


def test_a_configuration_that_changes_later_is_seen() -> None:
    model, batch = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=None)), batch_of()
    assert head_and_hidden(model, {"input_ids": batch["input_ids"]}) is not None
    model.config.final_logit_softcapping = 2.0
    agree(model, batch)


def test_a_head_that_is_watched_or_run_in_another_way_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"input_ids": batch_of()["input_ids"]}
    model = tiny_model("llama")
    assert head_and_hidden(model, inputs) is not None
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, out: None)
    assert head_and_hidden(model, inputs) is None
    handle.remove()
    assert head_and_hidden(model, {"inputs_embeds": torch.zeros(1, 2, 32)}) is not None
    for module in (model, model.get_output_embeddings()):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_compiled_call_impl", module.forward)
            assert head_and_hidden(model, inputs) is None
    with monkeypatch.context() as patch:
        patch.setattr(model.get_output_embeddings(), "forward", lambda x: x)
        assert head_and_hidden(model, inputs) is None


def test_the_routers_loss_is_in_neither_sum() -> None:
    model = tiny_model("mixtral", output_router_logits=True)
    agree(model, batch_of(ignored=2))


# ------------------------------------------------------------------------------------------------------------- adapted models
@pytest.mark.usefixtures("four_rows")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["lora", "dora", "reslora"])
def test_every_forward_of_an_adapted_model_has_its_own_masks(name: str, dropout: float, checkpointing: bool) -> None:
    adapted = attach(tiny_model("llama"), get_method(name, dropout=dropout))
    model = adapted.model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
    batch, losses = batch_of(ignored=2), list[float]()
    for step in (1, 2):
        with adapted.given(step=step):
            agree(model, batch)
            losses.append(forward_loss(model, batch)[0].item())
    assert (losses[0] != losses[1]) == (dropout > 0)
    torch.manual_seed(0)
    assert (forward_loss(model, batch)[0].item() != forward_loss(model, batch)[0].item()) == (dropout > 0)


@pytest.mark.usefixtures("four_rows")
@pytest.mark.parametrize(
    ("name", "options", "chunked"),
    [
        ("lora", {}, True),
        ("dora", {}, True),
        ("lora", {"dropout": 0.3}, False),
        ("lora", None, True),
    ],
)
def test_adapted_and_trained_heads(name: str, options: dict[str, Any] | None, chunked: bool) -> None:
    method = get_method(name) if options is None else get_method(name, sites=["lm_head", "q_proj"], r=3, **options)
    adapted = attach(tiny_model("llama"), method.but(unfreeze=("lm_head",)) if options is None else method)
    model, batch = adapted.model.train(), batch_of(ignored=2)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
    assert (head_and_hidden(model, {"input_ids": batch["input_ids"]}) is not None) == chunked
    with adapted.given(step=1):
        agree(model, batch)
    if not chunked:  # masks follow a row's place only where masks are drawn
        assert head_and_hidden(model.eval(), {"input_ids": batch["input_ids"]}) is not None


# ---------------------------------------------------------------------------------------------------------- nothing else changes
def test_the_model_is_left_as_it_was() -> None:
    adapted = attach(tiny_model("llama"), get_method("lora", dropout=0.1))
    model = adapted.model.train()
    model.lm_head.eval()
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with adapted.given(step=1):
        forward_loss(model, batch_of())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert model.lm_head._forward_hooks == {}
    assert all(slot.active for slot in model.modules() if isinstance(slot, Slot))
    assert "forward" not in model.lm_head.__dict__
    with pytest.raises((IndexError, RuntimeError)):
        forward_loss(model, batch_of() | {"input_ids": torch.full((3, 10), 10**6)})
    assert "forward" not in model.lm_head.__dict__


def test_those_who_count_what_a_model_sees_do_not_see_it_being_asked() -> None:
    model, batch, seen = tiny_model("llama"), batch_of(), list[torch.Size]()
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    for module in (model, model.model):
        module.register_forward_pre_hook(lambda module, args: seen.append(torch.Size()))
    forward_loss(model, batch)
    assert seen == [torch.Size(), torch.Size(), torch.Size([3, 10, 32])]


def test_a_model_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    answer = head._is_direct
    monkeypatch.setattr(head, "_is_direct", lambda model, top: asked.append(model) or answer(model, top))
    model = tiny_model("llama")
    for _ in range(3):
        forward_loss(model, batch_of())
    assert asked == [model]
