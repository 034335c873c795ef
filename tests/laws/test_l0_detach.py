"""L0: detach after attach is the identity: the same objects, classes, hooks and bits."""

from typing import Any

import pytest
from torch import nn

from lorakit import list_methods
from tests.laws.subject import attached, awaken, base, batch, everything, logits, loss_of, refuses_merge, same_bits, small


def check_L0(name: str) -> None:
    for arch in ("llama", "gpt2"):
        model = base(arch, tied=True)
        model.activation_checkpointing_enable({"use_reentrant": False})
        next(model.parameters()).requires_grad_(False)  # whatever was frozen stays so
        before, bits, out = _anatomy(model), everything(model), logits(model, batch())
        adapted = awaken(attached(model, small(name, sites=["all-linear", "embedding"], unfreeze=("lm_head",))))
        loss_of(model.train(), batch()).backward()
        if not refuses_merge(adapted):
            adapted.merge()
        assert adapted.detach() is model
        model.eval()
        assert _anatomy(model) == before
        after = everything(model)
        assert after.keys() == bits.keys()
        assert all(same_bits(after[k], bits[k]) for k in bits)
        assert same_bits(logits(model, batch()), out)
        assert all(p.grad is None for p in model.parameters())


def _anatomy(model: nn.Module) -> list[Any]:
    """What the model is made of, by identity."""
    modules = [(n, id(m), type(m), m.training, sorted(m.__dict__), _hooks(m)) for n, m in model.named_modules(remove_duplicate=False)]
    checkpointing = [_partial(m.__dict__.get("_gradient_checkpointing_func")) for m in model.modules()]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [modules, checkpointing, [(n, id(t), t.data_ptr(), t.requires_grad) for n, t in tensors], model.config.to_dict()]


def _hooks(module: nn.Module) -> list[int]:
    return [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("hooks") and v is not None]


def _partial(func: Any) -> Any:
    return None if func is None else (func.func, func.args, func.keywords)


@pytest.mark.parametrize("name", list_methods())
def test_L0(name: str) -> None:
    check_L0(name)
