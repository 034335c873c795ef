"""L18: two attaches of one Method share nothing. L19: NaN stays where it is. L20: a saved adapted model's folder is the base."""

import dataclasses
import tempfile

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lorakit import AdapterMismatch, list_methods
from tests.laws.steps import Run
from tests.laws.subject import attached, awaken, base, batch, everything, logits, refusal, same_bits, small, subject


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] if t.numel()}


def objects(model: nn.Module) -> set[int]:
    return {id(m) for m in model.modules()} | {id(m.cell) for m in model.modules() if hasattr(m, "cell")}


def check_L18(name: str) -> None:
    method = small(name, dropout=0.25)
    one, two = attached(base(), method), attached(base(seed=1), method)
    assert not storages(one.model) & storages(two.model)
    assert not objects(one.model) & objects(two.model)
    first, second = Run(one, total=8), Run(two, total=8)
    before = everything(two.model)
    first.steps(2)
    assert all(same_bits(before[k], v) for k, v in everything(two.model).items()), "training one moved the other"
    assert not {id(c) for c in first.controllers} & {id(c) for c in second.controllers}
    held = [{id(t) for t in _tensors_of(c.state_dict())} for c in (*first.controllers, *second.controllers)]
    assert len(set().union(*held)) == sum(map(len, held))
    assert dataclasses.replace(method) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.delta = None


def _tensors_of(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in inner for t in _tensors_of(v)]


def check_L19(name: str) -> None:
    adapted = subject(name, dropout=0.25)
    for training in (False, True):
        model = adapted.model.train(training)
        clean = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
        ill = clean.clone()
        ill[1] = torch.nan
        outs, grads = [], []
        for x in (clean, ill):
            x.requires_grad_()
            with adapted.given(step=0):
                out = model(inputs_embeds=x).logits
            (grad,) = torch.autograd.grad(out[[0, 2]].square().sum(), x)
            outs.append(out.detach()), grads.append(grad)
        assert outs[1][1].isnan().all()
        for found in (outs, grads):
            assert same_bits(found[0][[0, 2]], found[1][[0, 2]]), "a row of NaN reached another row"
    state = adapted.state()
    for value in (torch.nan, torch.inf):
        some = [key for key, tensor in state.tensors.items() if tensor.numel()]
        for key in (min(some), max(some)):
            tensors = {k: v.clone() for k, v in state.tensors.items()}
            tensors[key].view(-1)[-1] = value
            fresh = attached(base(), small(name))
            ill_one = dataclasses.replace(state, tensors=tensors)
            assert key in refusal(AdapterMismatch, lambda fresh=fresh, ill_one=ill_one: fresh.add("ill", ill_one))
            assert fresh.active == ("default",)


def check_L20(name: str) -> None:
    for arch in ("llama", "gpt2"):
        model = base(arch, tied=True)
        bits, out = everything(model), logits(model, batch())
        adapted = awaken(attached(model, small(name, sites=["all-linear", "embedding"])))
        assert not torch.equal(logits(model, batch()), out)
        with tempfile.TemporaryDirectory() as folder:
            adapted.model.save_pretrained(folder)
            plain = AutoModelForCausalLM.from_pretrained(folder)
        found = everything(plain)
        whole = {u.name: u.trained.detach() for u in adapted.unfrozen["default"]}  # what is trained whole is the model's own
        assert found.keys() == bits.keys()
        assert all(same_bits(found[k], whole.get(k, v)) for k, v in bits.items()), arch
        assert whole or same_bits(logits(plain.eval(), batch()), out)


@pytest.mark.parametrize("name", list_methods())
def test_L18(name: str) -> None:
    check_L18(name)


@pytest.mark.parametrize("name", list_methods())
def test_L19(name: str) -> None:
    check_L19(name)


@pytest.mark.parametrize("name", list_methods())
def test_L20(name: str) -> None:
    check_L20(name)
