"""The fused function is the reference's, in values and gradients, for one layer and several of one input; it keeps and computes less."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.core.base import Dense
from lorakit.ops import reference
from lorakit.ops.lora_linear import TENSORS, Layer, lora_linear
from lorakit.ops.mask import Mask

D_IN = 12


def linear(d_out: int, dtype: torch.dtype, rng: torch.Generator) -> nn.Linear:
    host = nn.Linear(D_IN, d_out, bias=False, dtype=dtype).requires_grad_(False)
    host.weight.copy_(torch.randn(d_out, D_IN, generator=rng, dtype=torch.float64))
    return host


def layer(seed: int, *, d_out: int = 7, r: int = 3, has: tuple[str, ...] = (), p: float = 0.0, dtype: torch.dtype = torch.float64) -> Layer:
    """A layer with what it `has` of g, b, gain and bias; everything is trained."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(wide).requires_grad_()

    tensors = {"A": draw(r, D_IN), "B": draw(d_out, r), "g": draw(r), "b": draw(d_out), "gain": draw(d_out), "bias": draw(d_out)}
    kept: dict[str, Any] = {k: t for k, t in tensors.items() if k in ("A", "B", *has)}
    mask = Mask(torch.tensor([seed, 1]), torch.tensor(5 + seed), p) if p else None
    host = linear(d_out, dtype, rng)
    bias = kept.get("bias")
    dense = Dense(host).dense if dtype == wide and seed % 2 else None  # every second one may be merged
    frozen = lambda x: F.linear(x, host.weight, None if bias is None else bias.to(dtype))  # noqa: E731
    return Layer(frozen, Dense(host).bound(), 0.5 + seed, **kept, mask=mask, dense=dense)


def plain(x: Tensor, one: Layer) -> Tensor:
    mask = None if one.mask is None else one.mask.keep(x.detach()).to(x.dtype) * one.mask.scale
    W = one.matmul_t(torch.eye(len(one.B), dtype=x.dtype), None)
    rest = {name: getattr(one, name) for name in ("g", "b", "gain", "bias")}
    return reference.lora_linear(x, W, one.A, one.B, one.s, **rest, mask=mask)


def both(layers: list[Layer], x: Tensor, used: list[int] | None = None) -> list[list[Tensor]]:
    """Outputs and gradients of the reference and of the fused function; `used`: the outputs that reach the loss."""
    used = list(range(len(layers))) if used is None else used
    wanted = [x, *(t for i in used for name in TENSORS if (t := getattr(layers[i], name)) is not None)]
    out = []
    for outputs in ([plain(x, one) for one in layers], lora_linear(x, layers)):
        loss = sum((outputs[i].square().sum() * (i + 1) for i in used), torch.zeros(()))
        out.append([*(y.detach() for y in outputs), *torch.autograd.grad(loss, wanted)])
    return out


def assert_alike(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * max(1.0, *a.detach().abs().flatten().tolist(), 0.0))


@settings(max_examples=60)
@given(
    st.lists(
        st.builds(
            dict,
            d_out=st.integers(1, 20),
            r=st.integers(1, 5),
            has=st.sets(st.sampled_from(["g", "b", "gain", "bias"])).map(tuple),
            p=st.sampled_from([0.0, 0.0, 0.3]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_values_and_gradients_are_the_references(forms: list[dict[str, Any]], data: st.DataObject) -> None:
    layers = [layer(i, **form) for i, form in enumerate(forms)]
    used = data.draw(st.lists(st.integers(0, len(layers) - 1), min_size=1, unique=True))
    tokens = data.draw(st.sampled_from([(2, 4), (2, 5), (30,)]))  # fewer than d_out, between, more than d_in
    x = torch.randn(*tokens, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(9), requires_grad=True)
    assert_alike(*both(layers, x, sorted(used)))


def test_an_output_that_reaches_no_loss_gives_its_layer_no_gradient() -> None:
    layers, x = [layer(0), layer(1)], torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    first, _ = lora_linear(x, layers)
    first.sum().backward()
    assert layers[0].A.grad is not None
    assert layers[1].A.grad is None
    assert layers[1].B.grad is None


def test_half_precision_is_near_the_reference_in_single() -> None:
    names = ("g", "b", "gain", "bias")
    wide = [layer(i, has=names, dtype=torch.float32) for i in range(2)]
    narrow = [layer(i, has=names, dtype=torch.bfloat16) for i in range(2)]
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    exact = both(wide, x.bfloat16().float().requires_grad_())[0]
    found = both(narrow, x.bfloat16().requires_grad_())[1]
    assert [t.dtype for t in found] == [*[torch.bfloat16] * 3, *[torch.float32] * 12]
    for e, f in zip(exact, found, strict=True):
        assert (e - f.float()).abs().max() < 0.05 * e.abs().max()


def test_a_gain_near_one_is_not_rounded_away_in_half_precision() -> None:
    one = layer(0, has=("gain",), dtype=torch.bfloat16)
    gain = torch.full((7,), 1 + 5 * 2**-9)  # between two values of bf16: the nearer one is off by 2⁻⁹
    x = torch.randn(4096, D_IN).bfloat16()
    (y,), (z,) = lora_linear(x, [one._replace(gain=gain)]), lora_linear(x, [one._replace(gain=None)])
    assert ((y.double() / z.double())[z != 0].mean() - gain[0]).abs() < 2**-11


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_layers_of_one_input_share_its_products() -> None:
    """Forward: W and an expansion each, one projection. Backward: W, dB and du each, one dA, one product of all A for dx, no sum of dx."""
    x, layers = torch.randn(6, D_IN, dtype=torch.float64, requires_grad=True), [layer(i) for i in range(3)]
    with Counted() as forward:
        outputs = lora_linear(x, layers)
    with Counted() as backward:
        torch.autograd.backward([y.sum() for y in outputs])
    assert forward.calls["mm"] + forward.calls["linear"] + forward.calls["addmm_"] == 3 + 3 + 1
    assert forward.calls["add"] + forward.calls["add_"] == 0
    assert backward.calls["mm"] + backward.calls["addmm_"] == 3 * 3 + 2
    assert backward.calls["add"] + backward.calls["add_"] == 0


def kept(x: Tensor, layers: list[Layer]) -> list[Tensor]:
    """Tensors kept for backward that are no layer's own."""
    own = {t.data_ptr() for one in layers for name in TENSORS if (t := getattr(one, name)) is not None}
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
        lora_linear(x, layers)
    return [t for t in found if t.data_ptr() not in own]


def test_only_what_backward_cannot_make_again_is_kept() -> None:
    x = torch.randn(6, D_IN, dtype=torch.float64, requires_grad=True)
    trained = layer(0, p=0.5)
    assert sorted(t.shape[-1] for t in kept(x, [trained])) == [3, D_IN]  # A x and x; no mask, no dropped x
    frozen = trained._replace(A=trained.A.detach())
    assert [t.shape[-1] for t in kept(x, [frozen])] == [3]
    assert kept(x, [frozen._replace(B=frozen.B.detach())]) == []
    assert sorted(t.shape[-1] for t in kept(x, [layer(0, has=("gain",))])) == [3, 7, D_IN]
    assert [t.data_ptr() for t in kept(x, [layer(0), layer(1)]) if t.shape[-1] == D_IN] == [x.data_ptr()]  # once for both


def test_nothing_trainable_below_asks_nothing_of_the_base() -> None:
    one = layer(0)
    calls: list[str] = []

    def matmul_t(dy: Tensor, into: Tensor | None) -> Tensor:
        calls.append("matmul_t")
        return one.matmul_t(dy, into)

    watched = one._replace(matmul_t=matmul_t)
    lora_linear(torch.randn(4, D_IN, dtype=torch.float64), [watched])[0].sum().backward()
    assert calls == []
    lora_linear(torch.randn(4, D_IN, dtype=torch.float64, requires_grad=True), [watched])[0].sum().backward()
    assert calls == ["matmul_t"]


@pytest.mark.parametrize("shape", [(0, D_IN), (1, D_IN), (2, 3, 4, D_IN), (D_IN,)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_alike(*both([layer(0), layer(1, p=0.2)], x))


def products(tokens: int, d_out: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of the sums W + ΔW formed in forward and in backward."""
    x = torch.randn(tokens, D_IN, dtype=torch.float64, requires_grad=True)
    with Shapes("addmm") as forward:
        (y,) = lora_linear(x, [layer(1, d_out=d_out)])
    with Shapes("addmm") as backward:
        y.sum().backward()
    return forward.shapes, backward.shapes


class Shapes(TorchDispatchMode):
    def __init__(self, name: str) -> None:
        self.name, self.shapes = name, list[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == self.name:
            self.shapes.append(tuple(out.shape))
        return out


def test_the_order_of_products_follows_the_shape() -> None:
    assert products(13, 20) == ([(20, D_IN)], [])  # more tokens than d_in
    assert products(12, 4) == ([], [(4, D_IN)])  # more than d_out
    assert products(30, 20) == ([(20, D_IN)], [(20, D_IN)])
    assert products(4, 4) == ([], [])


def test_merging_leaves_a_change_of_nothing_bit_for_bit() -> None:
    one = layer(1, has=("bias",), dtype=torch.float32)
    x = torch.randn(100, D_IN)
    (y,) = lora_linear(x, [one._replace(B=torch.zeros_like(one.B))])
    assert torch.equal(y, one.frozen(x))
