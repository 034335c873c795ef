"""`reference.attention` on the CPU: torch's flash kernel forward, segment by segment; a backward of few, large products.

    P = exp(scale · q kᵀ − L)      dv = Pᵀ dout      dP = dout vᵀ      dS = P ∘ (dP − Δ)      dq = scale · dS k      dk = scale · dSᵀ q

with L the logsumexp of each query's scores and Δ = Σ dout ∘ out. A product of bf16 is rounded when it is stored, and a score of 20 would
so cost P 4 % of its value. Hence L / scale and Δ, in parts that sum up to fp32's accuracy, are further columns of q and dout, facing
columns of −1 in k and v: the differences are formed in the product's fp32 accumulator and rounded once, where they are small.

Backward keeps q, k, v, out and L. Short segments of a row share one tile under a mask; a token that sees nothing but itself is a copy of v.
Blocks above the diagonal and keys before a window are left out.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHORT = 256
"""Tokens that short segments may have together to share a tile; also the queries or keys of a block."""
_AT_ONCE = 8192  # queries of all heads that are worked on together: fewer take longer to call than to multiply, more fill the caches
_LANES = 32  # bf16 products of the processor take inner dimensions in such steps
_PARTS = {torch.bfloat16: 3}  # so many numbers of 8 bits are one of fp32

_LONGEST = 1024  # a segment of more tokens, whose scores fit no cache, has torch's own backward; so has every one in fp32: measured

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tile(NamedTuple):
    """Tokens [start, end) of some rows that see each other only. `first`: each query's first key, counted from `start`; None: 0."""

    rows: range
    start: int
    end: int
    first: Tensor | None


class Plan(NamedTuple):
    """The tiles of a batch, and the (row, start, end) of tokens that see nothing but themselves."""

    tiles: tuple[Tile, ...]
    alone: tuple[tuple[int, int, int], ...]


def plan(first: Tensor | None, b: int, t: int) -> Plan:
    """How to go through b rows of t tokens."""
    if first is None:
        return Plan((Tile(range(b), 0, t, None),), ())
    return _planned(first.to(torch.int32).contiguous().numpy().tobytes(), b, t)


@lru_cache(maxsize=8)
def _planned(first: bytes, b: int, t: int) -> Plan:  # once for all layers, forward and backward
    table = torch.frombuffer(bytearray(first), dtype=torch.int32).view(b, t)
    tiles, alone = list[Tile](), list[tuple[int, int, int]]()
    for row in range(b):
        for start, end, lone in _spans(table[row]):
            seen = table[row, start:end] - start
            if lone:
                alone.append((row, start, end))
            else:
                tiles.append(Tile(range(row, row + 1), start, end, seen if bool(seen.any()) else None))
    return Plan(tuple(tiles), tuple(alone))


def _spans(first: Tensor) -> list[tuple[int, int, bool]]:
    """(start, end, alone) of one row: tokens alone, long segments, and short ones as many as go into a tile."""
    begins = (first == torch.arange(len(first))).nonzero().flatten().tolist()
    spans: list[tuple[int, int, bool]] = []
    for start, end in zip(begins, [*begins[1:], len(first)], strict=True):
        lone = end - start == 1
        if spans and spans[-1][2] == lone and (lone or end - spans[-1][0] <= SHORT):
            start = spans.pop()[0]
        spans.append((start, end, lone))
    return spans


@torch.library.custom_op("lorakit::attention", mutates_args=(), device_types="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out [b, h, t, d], L [b, h, t] in fp32 or q's wider dtype)."""
    (b, _, t, _), group = q.shape, q.shape[1] // k.shape[1]
    if first is None:
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        return _flash(q, k, v, 0.0, True, scale=scale)  # type: ignore[no-any-return]
    out, L = _outputs(q)
    tiles, alone = plan(first, b, t)
    for tile in tiles:
        r = slice(tile.rows.start, tile.rows.stop)
        for i, end, lo, bias in _queries(tile, q.dtype):
            keys, values = (x[r, :, lo:end].repeat_interleave(group, 1) if group > 1 else x[r, :, lo:end] for x in (k, v))
            part = _flash(q[r, :, i:end], keys, values, 0.0, bias is None, attn_mask=bias, scale=scale)
            out[r, :, i:end], L[r, :, i:end] = part
    for row, i, end in alone:
        out[row, :, i:end] = v[row, :, i:end].repeat_interleave(group, 0)
        L[row, :, i:end] = 0  # never read
    return out, L


def _queries(tile: Tile, dtype: torch.dtype) -> Iterator[tuple[int, int, int, Tensor | None]]:
    """(first query, end, first key, bias [1, 1, queries, keys]) of a tile's forward; no bias: causal."""
    start, n, first = tile.start, tile.end - tile.start, tile.first
    if first is None:
        yield start, tile.end, start, None
        return
    for i in range(0, n, SHORT):
        end, lo = min(n, i + SHORT), int(first[i])
        seen = _seen(first, range(lo, end), range(i, end)).T
        yield start + i, start + end, start + lo, torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[None, None]


def _seen(first: Tensor, keys: range, queries: range) -> Tensor:
    """bool [keys, queries] of a tile: first[query] ≤ key ≤ query."""
    key, query = torch.arange(keys.start, keys.stop)[:, None], torch.arange(queries.start, queries.stop)
    return (first[queries.start : queries.stop] <= key) & (key <= query)


@torch.library.custom_op("lorakit::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, L: Tensor, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), shaped as q, k and v."""
    (b, h, t, d), kv = q.shape, k.shape[1]
    dq, dk, dv = (_tokens_first(x) for x in (q, k, v))
    by_kv = [x.unflatten(1, (kv, h // kv)) for x in (q, dout, dq)]
    delta = torch.stack([(x * y).sum(-1, dtype=L.dtype) for x, y in zip(dout, out, strict=True)])  # row by row, in the cache
    extra = [_columns(x, q.dtype, d).unflatten(1, (kv, h // kv)) for x in (L / scale, delta)]
    room, signs = _Room(q), _signs(q)
    tiles, alone = plan(first, b, t)
    for tile in tiles:
        s = slice(tile.start, tile.end)
        if tile.first is None and (q.dtype != torch.bfloat16 or tile.end - tile.start > _LONGEST):
            r = (slice(tile.rows.start, tile.rows.stop), slice(None), s)
            dq[r], dk[r], dv[r] = _torch_backward(dout[r], q[r], k[r], v[r], out[r], L[r], scale)
            continue
        heads = max(1, _AT_ONCE // (tile.end - tile.start))
        for row, head in product(tile.rows, range(0, kv, heads)):
            at = (row, slice(head, head + heads))
            Q, D = (room.joined(n, x[at][:, :, s], e[at][:, :, s]) for n, x, e in zip("QD", by_kv, extra, strict=False))
            K, V = (room.joined(n, x[at][:, s], signs.expand(*x[at][:, s].shape[:-1], -1)) for n, x in (("K", k), ("V", v)))
            _tile_backward(room, (Q, D, K, V), tile.first, scale, (by_kv[2][at][:, :, s], dk[at][:, s], dv[at][:, s]))
    for row, i, end in alone:
        dq[row, :, i:end], dk[row, :, i:end] = 0, 0
        dv[row, :, i:end] = by_kv[1][row, :, :, i:end].sum(1)
    return dq, dk, dv


def _tile_backward(room: "_Room", wide: tuple[Tensor, ...], first: Tensor | None, scale: float, grads: tuple[Tensor, ...]) -> None:
    """Fill dq [m, g, n, d], dk and dv [m, n, d] of m key-value heads. wide: q, dout [m, g, n, w], k, v [m, n, w] with their columns."""
    (Q, D, K, V), (dq, dk, dv) = wide, grads
    (m, g, n, w), d = Q.shape, dq.shape[-1]
    whole = n <= SHORT
    total = dq if whole else torch.zeros(dq.shape, dtype=torch.promote_types(Q.dtype, torch.float32))
    for j, end, last, hidden in _keys(first, n):
        q, do = (room.copied(name, x[:, :, j:last]).view(m, -1, w) for name, x in (("q", Q), ("do", D)))
        k, v = (room.copied(name, x[:, j:end]) for name, x in (("k", K), ("v", V)))
        P = room.product("P", k, q.mT, scale).exp_()  # [m, keys, g · queries], transposed: then most products need no transposition
        _hide(P.view(m, end - j, g, last - j), hidden)
        dv[:, j:end] = room.product("out", P, do)[..., :d]
        dS = P.mul_(room.product("dP", v, do.mT))
        dk[:, j:end] = room.product("out", dS, q, scale)[..., :d]
        part = room.product("dq", dS.mT, k, scale)[..., :d].view(m, g, last - j, d)
        if whole:
            dq.copy_(part)
        else:
            total[:, :, j:last] += part
    if not whole:
        dq.copy_(total)


def _torch_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, L: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one causal segment by torch's own kernel."""
    kv, group = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    dq, dk, dv = _flash_backward(dout, q, keys, values, out, L, 0.0, True, scale=scale)
    return dq, *(x.unflatten(1, (kv, group)).sum(2) if group > 1 else x for x in (dk, dv))


class _Room:
    """Working memory of one backward, used again by every tile: it stays in the cache."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.held = like, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size)
        return self.held[name][:size].view(shape)

    def joined(self, name: str, x: Tensor, columns: Tensor) -> Tensor:
        """[x, columns] side by side, contiguous."""
        return torch.cat([x, columns], -1, out=self(name, *x.shape[:-1], x.shape[-1] + columns.shape[-1]))

    def copied(self, name: str, x: Tensor) -> Tensor:
        """x, contiguous: products of bf16 would copy it each time."""
        return x if x.is_contiguous() else self(name, *x.shape).copy_(x)

    def product(self, name: str, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """scale · x y, rounded once: [m, a, c], [m, c, b] -> [m, a, b]."""
        out = self(name, len(x), x.shape[1], y.shape[2])
        return torch.baddbmm(out, x, y, beta=0, alpha=scale, out=out)


def _keys(first: Tensor | None, n: int) -> Iterator[tuple[int, int, int, Tensor | None]]:
    """(first key, end, end of the queries that see any, hidden [keys, queries]) of a tile's backward; none hidden: but for causality."""
    for j in range(0, n, SHORT):
        end = min(n, j + SHORT)
        if first is None:
            yield j, end, n, None
        else:
            last = int(torch.searchsorted(first, end - 1, right=True))
            yield j, end, last, ~_seen(first, range(j, end), range(j, last))


def _hide(P: Tensor, hidden: Tensor | None) -> None:
    """Zero what a query does not see: P [m, keys, g, queries], in place. Never by a factor, as exp may be infinite there."""
    if hidden is not None:
        P.masked_fill_(hidden[:, None], 0)
        return
    for head in P.unbind(2):
        head[..., : P.shape[1]].triu_()


def _columns(x: Tensor, dtype: torch.dtype, d: int) -> Tensor:
    """The columns that stand for x [..]: [.., parts and zeros], their sum x to fp32's accuracy."""
    parts = []
    for _ in range(_PARTS.get(dtype, 1)):
        parts.append(x.to(dtype))
        x = x - parts[-1]
    return torch.nn.functional.pad(torch.stack(parts, -1), (0, _padding(dtype, d)))


def _signs(x: Tensor) -> Tensor:
    """The columns of −1 in k and v that meet those of `_columns`: [parts and zeros]."""
    parts = _PARTS.get(x.dtype, 1)
    return torch.nn.functional.pad(x.new_full((parts,), -1), (0, _padding(x.dtype, x.shape[-1])))


def _padding(dtype: torch.dtype, d: int) -> int:
    parts = _PARTS.get(dtype)
    return 0 if parts is None else -(d + parts) % _LANES


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out and L, laid out as the flash kernel does."""
    L = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    return _tokens_first(q), L


def _tokens_first(x: Tensor) -> Tensor:
    """Room for [b, h, t, d] in the order [b, t, h, d] in memory, which the projections before and after have."""
    b, h, t, d = x.shape
    return x.new_empty(b, t, h, d).transpose(1, 2)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, L: Tensor, first: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _tokens_first(q), _tokens_first(k), _tokens_first(v)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, first, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, first)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, L, first = ctx.saved_tensors
    return *_attention_backward(dout, q, k, v, out, L, first, ctx.scale), None, None


_attention.register_autograd(_backward, setup_context=_keep)


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, *, scale: float) -> Tensor:
    """Causal attention on the CPU: q [b, h, t, d]; k, v [b, h_kv, t, d] -> [b, h, t, d], in fp32, fp64 or bf16.

    `first` [b, t], integers: the first key that each query sees (it sees all up to itself), which never falls along a row; a segment's
    first token sees itself alone. None: query i sees the keys 0 to i.
    """
    out: Tensor = _attention(q, k, v, first, scale)[0]
    return out
