"""L11: a compiled adapted layer equals eager: one graph, no recompile across steps, whose masks differ. aot_eager; inductor is slow."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lorakit import Adapted, list_methods
from tests.laws.subject import batch, far, has_dropout, said, subject


def layers(adapted: Adapted) -> list[nn.Module]:
    """One plain and one fused adapted module."""
    return list({id(b.host.module): b.host.module for b in adapted.branches()}.values())[:2]


def passes(layer: nn.Module, call: nn.Module, adapted: Adapted, steps: int) -> list[Tensor]:
    """Outputs and gradients of some training steps, each under its own key."""
    found, told = [], said(adapted, layer, batch(rows=3, length=5))
    tensors = [p for p in layer.parameters() if p.requires_grad]
    for i in range(steps):
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(i), requires_grad=True)
        with adapted.given(step=i):
            adapted.context.memo.update(told)
            y = call(x)
        found += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *tensors])]
    return found


def check_L11(name: str, *, backend: str = "aot_eager", tolerance: float = 1e-6) -> None:
    adapted = subject(name, "gpt2", sites=["c_attn[q]", "c_attn[v]", "c_fc"], dropout=0.25)
    adapted.model.train()
    for layer in layers(adapted):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        eager = passes(layer, layer, adapted, 4)
        try:
            compiled = passes(layer, torch.compile(layer, backend=counter, fullgraph=True), adapted, 4)
        except torch._dynamo.exc.TorchDynamoException as broken:
            raise AssertionError(f"{name} breaks the graph: {broken}") from broken
        assert counter.frame_count == 1, f"{counter.frame_count} graphs were compiled for 4 steps"
        assert all(far(c, e) < tolerance for c, e in zip(compiled, eager, strict=True))
        if has_dropout(name):
            x, told = torch.ones(3, 5, 32), said(adapted, layer, batch(rows=3, length=5))
            with adapted.given(step=0):
                adapted.context.memo.update(told)
                one = layer(x)
            with adapted.given(step=1):
                adapted.context.memo.update(told)
                assert not torch.equal(layer(x), one), "the mask does not follow the step"


@pytest.mark.parametrize("name", list_methods())
def test_L11(name: str) -> None:
    check_L11(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch warns of itself
@pytest.mark.parametrize("name", list_methods())
def test_L11_inductor(name: str) -> None:
    check_L11(name, backend="inductor", tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "prefix", "prompt_tuning", "longlora", "hiddenkey", "dropbp"])
def test_a_whole_model_compiles_and_trains_as_eager(name: str) -> None:
    """With a key given and without one."""
    for given in (True, False):
        torch._dynamo.reset()
        adapted = subject(name, dropout=0.25)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(adapted.model.train(), backend=counter, fullgraph=True)
        for i in range(3):
            found = []
            for model in (compiled, adapted.model):
                torch.manual_seed(i)
                with adapted.given(step=i) if given else nullcontext():
                    loss = model(input_ids=batch(i), labels=batch(i)).loss
                found.append([loss.detach(), *torch.autograd.grad(loss, [p.tensor for p in adapted.params()])])
            assert all(far(a, b) < 1e-5 for a, b in zip(*found, strict=True))
        assert counter.frame_count <= (1 if given else 2)
