"""Attention by segments against its definition: outputs, gradients, what backward keeps, what is left out, compilation."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lorakit.ops import attention as op
from lorakit.ops import reference
from lorakit.ops.attention import SHORT, attention, plan

SHAPES = [(2, 4, 2, 37, 16), (1, 3, 3, 700, 24), (1, 4, 1, 300, 40), (2, 2, 2, 1, 8)]  # b, h, h_kv, t, d
# of the output and of the gradients, relative to the largest: bf16's P and dS are rounded once each
BOUNDS = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-5, 5e-5), torch.bfloat16: (0.01, 0.02)}


def first_of(sizes: Sequence[Sequence[int]], t: int, window: int | None = None) -> Tensor:
    """[b, t] of rows of segments; what is left of a row is padding, each token alone."""
    rows = []
    for segments in sizes:
        row: list[int] = []
        for size in segments:
            start = len(row)
            row += [max(start, start + i - (window or t) + 1) for i in range(size)]
        rows.append(row + list(range(len(row), t)))
    return torch.tensor(rows, dtype=torch.int32)


def layouts(b: int, t: int) -> dict[str, Tensor | None]:
    whole, third = [[t]] * b, max(1, t // 3)
    return {
        "causal": None,
        "short": first_of([[min(5, t), *[1] * min(2, t - 5), *[3] * ((t - 8) // 3)] if t > 8 else [t]] * b, t),
        "long": first_of([[t - third, third], [third]][:b], t),
        "padded": first_of([[max(1, t - 3)], *whole][:b], t),
        "alone": first_of([[1]] * b, t),
        "window": first_of([[t - third, third], *whole][:b], t, window=7),
        "wide window": first_of(whole, t, window=SHORT + 30),
    }


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """q, k, v as a projection leaves them, [b, t, h, d] in memory, and a gradient of the output. Scores reach ±20."""
    b, h, kv, t, d = shape
    gen = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(b, t, heads, d, generator=gen).to(dtype).transpose(1, 2) for heads in (h, kv, kv, h))
    return [x.requires_grad_() for x in (q * 2, k, v)], dout


def both(f: Callable[..., Tensor], xs: Sequence[Tensor], first: Tensor | None, dout: Tensor) -> list[Tensor]:
    out = f(*xs, first, scale=0.4)
    return [out.detach(), *torch.autograd.grad(out, xs, dout)]


@pytest.mark.parametrize("layout", list(layouts(1, 9)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_the_same_outputs_and_gradients(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    first = layouts(shape[0], shape[3])[layout]
    xs, dout = draw(shape, dtype)
    exact = both(reference.attention, [x.detach().double().requires_grad_() for x in xs], first, dout.double())
    found = both(attention, xs, first, dout)
    for got, want, name in zip(found, exact, ("out", "dq", "dk", "dv"), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        size = float((want if want.any() else dout).abs().max())  # a token alone moves no query and no key
        assert float((got.double() - want).abs().max()) / size <= BOUNDS[dtype][name != "out"], name


def test_the_definition_is_softmax_over_what_a_query_sees() -> None:
    (q, k, v), _ = draw((1, 2, 1, 5, 4))
    out = reference.attention(q, k, v, torch.tensor([[0, 0, 2, 2, 3]]), scale=0.4)
    seen = {0: [0], 1: [0, 1], 2: [2], 3: [2, 3], 4: [3, 4]}
    for head in range(2):
        for i, keys in seen.items():
            weights = (0.4 * k[0, 0, keys] @ q[0, head, i]).softmax(0)
            torch.testing.assert_close(out[0, head, i], weights @ v[0, 0, keys])


def test_bf16_gradients_are_no_worse_than_those_of_torchs_kernel() -> None:
    xs, dout = draw((1, 4, 4, 300, 64), torch.bfloat16)
    exact = both(reference.attention, [x.detach().double().requires_grad_() for x in xs], None, dout.double())

    def sdpa(q: Tensor, k: Tensor, v: Tensor, first: None, *, scale: float) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    ours, theirs = both(attention, xs, None, dout), both(sdpa, xs, None, dout)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert (got.double() - want).norm() <= 2 * (other.double() - want).norm()


@pytest.mark.parametrize("layout", ["causal", "short"])
def test_a_later_tokens_huge_score_leaves_no_trace(layout: str) -> None:
    (q, k, v), dout = draw((1, 1, 1, 20, 8), torch.bfloat16)
    with torch.no_grad():
        k[:, :, 18] = 400 * q[:, :, 7]  # exp of it is infinite, where that query must not look; both are in one tile
    assert all(x.isfinite().all() for x in both(attention, [q, k, v], layouts(1, 20)[layout], dout))


@pytest.mark.parametrize("layout", ["causal", "short"])
def test_backward_keeps_q_k_v_out_and_a_number_a_query(layout: str) -> None:
    shape = (2, 4, 2, 37, 16)
    (q, k, v), _ = draw(shape, torch.bfloat16)
    first, kept = layouts(2, 37)[layout], dict[int, int]()

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention(q, k, v, first, scale=0.4)
    expected = sum(x.numel() * 2 for x in (q, q, k, v)) + 2 * 4 * 37 * 4 + (0 if first is None else first.numel() * 4)
    assert sum(kept.values()) == expected
    assert {x.untyped_storage().data_ptr() for x in (q, k, v)} <= set(kept)  # themselves, not copies


def scores(monkeypatch: pytest.MonkeyPatch, first: Tensor | None, t: int) -> tuple[int, int]:
    """Scores computed for one head, forward and backward."""
    counts = [0, 0]
    flash, plain = op._flash, op._Room.product

    def counted(q: Tensor, k: Tensor, *rest: object, **options: object) -> object:
        counts[0] += q.shape[2] * k.shape[2]
        return flash(q, k, *rest, **options)

    def product(room: object, name: str, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        counts[1] += x.shape[1] * y.shape[2] if name == "P" else 0
        return plain(room, name, x, y, scale)  # type: ignore[arg-type]

    monkeypatch.setattr(op, "_flash", counted)
    monkeypatch.setattr(op._Room, "product", product)
    xs, dout = draw((1, 1, 1, t, 8), torch.bfloat16)
    both(attention, xs, first, dout)
    return counts[0], counts[1]


def test_what_nobody_sees_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    t = 1024
    assert scores(monkeypatch, first_of([[400, 300, 100]], t), t)[0] == 400**2 + 300**2 + 100**2  # the padding costs nothing
    assert scores(monkeypatch, first_of([[1]], t), t) == (0, 0)
    _, backward = scores(monkeypatch, None, t)
    assert backward == SHORT**2 * (4 + 3 + 2 + 1)  # no block above the diagonal
    forward, backward = scores(monkeypatch, first_of([[t]], t, window=64), t)
    assert forward < t * 2 * SHORT and backward < t * 2 * SHORT  # no key before the window's blocks


def test_short_segments_share_a_tile() -> None:
    tiles, alone = plan(first_of([[100, 100, 56, 100, 1, 30]], 400), 1, 400)
    assert [(tile.start, tile.end, tile.first is None) for tile in tiles] == [(0, 256, False), (256, 356, True), (357, 387, True)]
    assert alone == ((0, 356, 357), (0, 387, 400))


def test_gradients_by_finite_differences() -> None:
    xs, _ = draw((1, 2, 1, 6, 3))
    first = first_of([[3, 2]], 6)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, first, scale=0.4), xs)


@pytest.mark.parametrize("layout", ["causal", "short"])
def test_torchs_own_check_of_operations(layout: str) -> None:
    xs, _ = draw((1, 2, 1, 20, 8), torch.float32)
    torch.library.opcheck(op._attention, (*xs, layouts(1, 20)[layout], 0.4))


def test_it_compiles_without_a_break_for_any_segments() -> None:
    xs, dout = draw((1, 2, 1, 40, 8), torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for sizes in ([[40]], [[20, 15]], [[1, 2, 3]]):
        first = first_of(sizes, 40)
        for got, want in zip(both(compiled, xs, first, dout), both(attention, xs, first, dout), strict=True):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
