"""The chunked loss is the reference's in value and gradients, for every kind of head; whole logits never live, and little is kept."""

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorakit.core.attach import attach
from lorakit.core.method import get_method
from lorakit.data.tiny import tiny_model
from lorakit.ops import reference
from lorakit.ops.cross_entropy import BLOCK, IGNORED, head_loss
from lorakit.parts.bases.nf4_base import NF4Spec
from lorakit.parts.bases.quantize import quantize

D, V, N = 6, 11, 9


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(n: int, v: int, *, ignored: int = 0, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(v, (n,), generator=rng).index_fill(0, torch.randperm(n, generator=rng)[:ignored], IGNORED)


def linear(d: int = D, v: int = V, *, bias: bool = False, trained: bool = False, dtype: torch.dtype = torch.float64) -> nn.Linear:
    head = nn.Linear(d, v, bias=bias, dtype=dtype).requires_grad_(trained)
    with torch.no_grad():
        for i, p in enumerate(head.parameters()):
            p.copy_(draw(*p.shape, seed=i + 5, dtype=dtype))
    return head


def everything(loss: Callable[[Tensor], Tensor], h: Tensor, head: nn.Module, *, needs_h: bool = True) -> dict[str, Tensor]:
    """The loss, ∂h and the gradients of all that learns."""
    head.zero_grad()
    h = h.detach().requires_grad_(needs_h)
    value = loss(h)
    (value * 3).backward()  # an incoming scalar other than 1
    grads = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **({} if h.grad is None else {"h": h.grad}), **grads}


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == one.dtype, name
        assert (found[name] - one).abs().max() <= tolerance * max(1.0, float(one.abs().max())) if one.numel() else True, name


# ------------------------------------------------------------------------------------------------------------ a plain head
@settings(max_examples=60)
@given(
    n=st.integers(0, 12),
    d=st.integers(1, 7),
    v=st.integers(1, 13),
    rows=st.integers(1, 14),
    block=st.integers(1, 60),
    share=st.floats(0, 1),
    bias=st.booleans(),
    trained=st.booleans(),
    needs_h=st.booleans(),
)
def test_any_shape_any_chunk_any_label(
    n: int, d: int, v: int, rows: int, block: int, share: float, bias: bool, trained: bool, needs_h: bool
) -> None:
    head, h, y = linear(d, v, bias=bias, trained=trained), draw(n, d), labels(n, v, ignored=round(share * n))
    if not (trained or needs_h):
        assert not head_loss(h, head, y, rows=rows).requires_grad
        return
    with patch.dict(BLOCK, cpu=block):
        found = everything(lambda x: head_loss(x, head, y, rows=rows), h, head, needs_h=needs_h)
    agree(found, everything(lambda x: reference.head_loss(x, head, y), h, head, needs_h=needs_h))


@pytest.mark.parametrize("trained", [False, True])
def test_half_precision_is_as_near_to_fp32_as_the_reference(trained: bool) -> None:
    h, y, exact = (
        draw(64, 32, dtype=torch.bfloat16),
        labels(64, 50, ignored=9),
        linear(32, 50, bias=True, trained=True, dtype=torch.float32),
    )
    half = copy.deepcopy(exact).bfloat16().requires_grad_(trained)
    exact.load_state_dict(half.state_dict())
    wanted = everything(lambda x: reference.head_loss(x, exact, y), h.float(), exact)
    plain = everything(lambda x: reference.head_loss(x, half, y), h, half)
    found = everything(lambda x: head_loss(x, half, y, rows=13), h, half)
    assert found.keys() == plain.keys()
    assert found["loss"].dtype == torch.float32
    for name, one in found.items():
        error, allowed = ((t[name].float() - wanted[name]).norm() for t in (found, plain))
        assert one.dtype == plain[name].dtype
        assert error <= 1.2 * allowed + 1e-6 * wanted[name].norm(), name


def test_shapes_before_the_last_do_not_matter() -> None:
    head, y = linear(), labels(N, V, ignored=2)
    flat = everything(lambda x: head_loss(x, head, y, rows=4), draw(N, D), head)
    deep = everything(lambda x: head_loss(x, head, y.view(3, 3), rows=4), draw(N, D).view(3, 3, D), head)
    assert deep["h"].shape == (3, 3, D)
    agree({**deep, "h": deep["h"].view(N, D)}, flat)


def test_what_an_ignored_row_holds_is_never_seen() -> None:
    head, y = linear(), labels(N, V)
    y[[0, 5]] = IGNORED
    h = draw(N, D)
    h[0], h[5] = torch.nan, torch.inf
    found = everything(lambda x: head_loss(x, head, y, rows=4), h, head)
    assert found["loss"].isfinite()
    assert (found["h"][[0, 5]] == 0).all()
    clean = everything(lambda x: head_loss(x, head, y, rows=4), draw(N, D), head)
    agree({k: v.nan_to_num() for k, v in found.items()}, clean)


def test_large_logits_keep_their_loss() -> None:
    """exp(−200) is 0 in fp32, its logarithm is not."""
    head, h = linear(1, 2, dtype=torch.float32), torch.tensor([[1.0]])
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [200.0]]))
    assert head_loss(h, head, torch.tensor([0])).item() == pytest.approx(200)


def test_a_label_outside_of_the_vocabulary_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        head_loss(draw(1, D).requires_grad_(), linear(), torch.tensor([V]))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    h = draw(N, D).requires_grad_()
    with pytest.raises(RuntimeError, match="a first derivative only"):
        torch.autograd.grad(head_loss(h.tanh(), linear(), labels(N, V)), h, create_graph=True)


def test_under_autocast() -> None:
    head, h, y = linear(32, 50, dtype=torch.float32), draw(20, 32, dtype=torch.float32), labels(20, 50)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(lambda x: head_loss(x, head, y, rows=8), h, head)
        agree(found, everything(lambda x: reference.head_loss(x, head, y), h, head), tolerance=1e-2)
    assert found["h"].dtype == torch.float32
    assert torch.equal(found["h"] / 3, (found["h"] / 3).bfloat16().float())  # its product was autocast's, too


# ------------------------------------------------------------------------------------------------------- heads in models
def adapted_head(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Linear]:
    """A model in training mode whose head learns, away from its start."""
    model: nn.Module = tiny_model("llama", tied=options.pop("tied", False)).to(dtype)
    if options.pop("packed", False):
        quantize(model, NF4Spec(sites=["lm_head"]))
    if name:
        unfreeze = options.pop("unfreeze", ())
        method = get_method(name, **options)
        attach(model, method.but(unfreeze=unfreeze) if unfreeze else method)
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(draw(*p.shape, seed=i, dtype=p.dtype), alpha=0.1)
    return model.train(), model.get_output_embeddings()


HEADS: dict[str, Callable[[], tuple[nn.Module, nn.Linear]]] = {
    "lora": lambda: adapted_head("lora", sites=["lm_head"], r=3),
    "dora": lambda: adapted_head("dora", sites=["lm_head"], r=3),
    "lora_fa": lambda: adapted_head("lora_fa", sites=["lm_head"], r=3),
    "vera": lambda: adapted_head("vera", sites=["lm_head"], r=3),
    "vb_lora": lambda: adapted_head("vb_lora", sites=["lm_head"], r=2, vector_length=16),
    "tied base": lambda: adapted_head("lora", sites=["lm_head"], r=3, tied=True),
    "trained whole": lambda: adapted_head("lora", unfreeze=("lm_head",)),
    "all trained": lambda: adapted_head(""),
    "all trained and tied": lambda: adapted_head("", tied=True),
}


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_that_learns(kind: str) -> None:
    model, head = HEADS[kind]()
    h, y = draw(N, 32), labels(N, 128, ignored=2)
    found = everything(lambda x: head_loss(x, head, y, rows=4), h, model)
    wanted = everything(lambda x: reference.head_loss(x, head, y), h, model)
    assert len(wanted) > 2  # a pool's gradients, too, lie in the model and not in the head
    agree(found, wanted, tolerance=1e-5 if found["loss"].dtype == torch.float32 else 1e-12)
    agree(everything(lambda x: head_loss(x, head, y, rows=4), h, model, needs_h=False), {k: v for k, v in wanted.items() if k != "h"})


def test_a_frozen_adapter_is_still_in_the_head() -> None:
    model, head = HEADS["lora"]()
    model.requires_grad_(False)
    h, y = draw(N, 32), labels(N, 128, ignored=2)
    agree(
        everything(lambda x: head_loss(x, head, y, rows=4), h, model), everything(lambda x: reference.head_loss(x, head, y), h, model), 1e-5
    )


def test_a_quantized_head() -> None:
    model, head = adapted_head("lora", torch.float32, sites=["lm_head"], r=3, packed=True)
    h, y = draw(N, 32, dtype=torch.float32), labels(N, 128, ignored=2)
    found = everything(lambda x: head_loss(x, head, y, rows=4), h, model)
    agree(found, everything(lambda x: reference.head_loss(x, head, y), h, model), tolerance=1e-5)


def test_a_gradient_that_somebody_changes_is_changed_once() -> None:
    head, h, y = linear(trained=True), draw(N, D), labels(N, V)
    head.weight.register_hook(lambda g: 2 * g)
    found = everything(lambda x: head_loss(x, head, y, rows=4), h, head)
    agree(found, everything(lambda x: reference.head_loss(x, head, y), h, head))


# ---------------------------------------------------------------------------------------------------- how gradients are asked for
@pytest.mark.parametrize("trained", [False, True])
def test_two_forwards_before_one_backward_and_one_graph_twice(trained: bool) -> None:
    head, (y1, y2) = linear(trained=trained), (labels(N, V, seed=i) for i in (1, 2))

    def twice(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: loss(x, head, y1) + 2 * loss(x.flip(0), head, y2)

    agree(
        everything(twice(lambda *args: head_loss(*args, rows=4)), draw(N, D), head),
        everything(twice(reference.head_loss), draw(N, D), head),
    )
    h = draw(N, D).requires_grad_()
    loss = head_loss(h, head, y1, rows=4)
    first = torch.autograd.grad(loss, h, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, h)[0])


@pytest.mark.parametrize("trained", [False, True])
def test_inside_activation_checkpointing(trained: bool) -> None:
    head, y = linear(trained=trained), labels(N, V)
    body = nn.Linear(D, D, dtype=torch.float64)

    def whole(x: Tensor) -> Tensor:
        return checkpoint(lambda x: head_loss(body(x).tanh(), head, y, rows=4), x, use_reentrant=False)

    found = everything(whole, draw(N, D), nn.ModuleList([head, body]))
    agree(found, everything(lambda x: reference.head_loss(body(x).tanh(), head, y), draw(N, D), nn.ModuleList([head, body])))


# ----------------------------------------------------------------------------------------------------------------- counted work
class Largest(TorchDispatchMode):
    """The most values in any tensor made, of a dtype if given, and the calls of each operation."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.numel, self.calls = 0, dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.__name__] = self.calls.get(func.__name__, 0) + 1
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors if self.dtype in (None, t.dtype))])
        return out


@pytest.mark.parametrize("trained", [False, True])
def test_whole_logits_never_live(trained: bool) -> None:
    n, d, v, rows = 64, 4, 40, 8
    head, h, y = linear(d, v, trained=trained), draw(n, d).requires_grad_(), labels(n, v)
    with Largest() as seen:
        head_loss(h, head, y, rows=rows).backward()
    assert seen.numel == rows * v
    assert sum(count for name, count in seen.calls.items() if name.startswith(("mm", "addmm"))) == (n // rows) * (3 if trained else 2)
    with Largest() as seen:
        reference.head_loss(h, head, y).backward()
    assert seen.numel == n * v


@pytest.mark.parametrize("trained", [False, True])
def test_fp32_logits_are_a_block(trained: bool) -> None:
    head, h, y = linear(4, 40, trained=trained, dtype=torch.bfloat16), draw(64, 4, dtype=torch.bfloat16).requires_grad_(), labels(64, 40)
    with patch.dict(BLOCK, cpu=3 * 40), Largest(torch.float32) as seen:
        head_loss(h, head, y, rows=8)
    assert seen.numel == max(3 * 40, 40 * 4 * trained)  # a trained weight's gradient is summed up in fp32


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    head, h, y = linear(trained=True), draw(N, D).requires_grad_(), labels(N, V)
    with torch.no_grad(), Largest() as seen:
        loss = head_loss(h, head, y, rows=4)
    assert seen.calls["mm.default"] == 3
    assert not loss.requires_grad
    assert (loss - reference.head_loss(h, head, y)).abs() < 1e-12


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_kept_for_backward_is_the_gradients(trained: bool) -> None:
    n, d, v = 64, 4, 40
    head, h, y = linear(d, v, trained=trained), draw(n, d).requires_grad_(), labels(n, v)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        loss = head_loss(h, head, y, rows=8)
    there = {t.untyped_storage().data_ptr() for t in (h, *head.parameters())}
    live = [t for key, t in kept.items() if key not in there]
    assert loss.requires_grad
    del loss
    assert {tuple(t.shape) for t in live if t.numel() > v * 8} <= {(n, d), (v, d)}
