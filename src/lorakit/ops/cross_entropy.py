"""`reference.head_loss` some rows at a time: the summed next-token loss of hidden states through a model's head, and its gradients with it.

    loss = Σ_i −log softmax(head(h_i))[t_i]        ∂loss/∂head(h_i) = softmax(head(h_i)) − onehot(t_i)       h [.., d], t [..], head: d -> v

Each chunk's logits [c, v] yield the chunk's loss and at once its gradients, and are gone before the next chunk's. They are never computed
twice: forward leaves gradients of the sizes of h and of what is trained in the head, and backward multiplies those by the incoming scalar.
A frozen dense head goes by the closed form above; any other is run under autograd, a chunk at a time.

References: arXiv:2410.10989 (gradients in forward); arXiv:2411.09009 (cut cross-entropy).
"""

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The target of a row without a loss: torch's own default."""
CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Logits of a chunk."""
BLOCK = {"cpu": 2**20, "cuda": 2**26}
"""Logits of a chunk that are in fp32 at a time: 4 MB stay in the CPU's cache, and memory beyond 32 MB would be fetched anew each time."""
ROWS = 256
"""At least so many rows a chunk: each reads the whole head again, and with 128 the CPU's bf16 products take 1.4 times as long."""


def head_loss(h: Tensor, head: nn.Linear, targets: Tensor, *, rows: int | None = None) -> Tensor:
    """Σ −log softmax(head(h))[target] in at least fp32: h [.., d], targets [..], scalar. Ignored targets add nothing.

    It can be differentiated once; a second derivative raises.

    Args:
        h: hidden states, of any dtype that the head takes.
        head: any linear layer that treats rows alike: plain, tied, adapted, quantized, trained. Its own hooks see chunks, or nothing.
        targets: int64, `IGNORED` where there is none.
        rows: rows of a chunk; None for about `CHUNK` logits, but no fewer than `ROWS` rows.
    """
    x, y = h.flatten(0, -2), targets.flatten()
    rows = rows or max(ROWS, CHUNK.get(x.device.type, CHUNK["cpu"]) // head.out_features)
    chunks = [slice(i, i + rows) for i in range(0, max(1, len(x)), rows)]  # no row at all is a chunk, too: its loss is 0
    frozen = _frozen(head, x)
    if not torch.is_grad_enabled() or (frozen and not x.requires_grad):
        return _sum([_loss(head(x[c]), y[c]) for c in chunks])
    return (_closed if frozen else _traced)(x, head, y, chunks)


def head_losses(h: Tensor, head: nn.Linear, targets: Tensor, *, rows: int | None = None) -> Tensor:
    """−log softmax(head(h))[target] of each row, in at least fp32: h [n, d], targets [n], losses [n]; 0 where a target is ignored.

    For a loss that weighs rows by what all of them say (train/preference.py). Arguments as in `head_loss`; it can be differentiated once. A
    frozen dense head leaves a gradient of the size of h; any other runs again in backward, a chunk at a time. With and without gradients
    the losses are the same bits.
    """
    rows = rows or max(ROWS, CHUNK.get(h.device.type, CHUNK["cpu"]) // head.out_features)
    chunks = [slice(i, i + rows) for i in range(0, max(1, len(h)), rows)]
    frozen = _frozen(head, h)
    if not torch.is_grad_enabled() or (frozen and not h.requires_grad):
        return torch.cat([_row_losses(head(h[c]), targets[c]) for c in chunks])
    if frozen:
        return _closed_rows(h, head, targets, chunks)
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([run(lambda part, y: _row_losses(head(part), y), h[c], targets[c]) for c in chunks])


def _row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(_wide(logits)), targets, ignore_index=IGNORED, reduction="none")


def _closed_rows(x: Tensor, head: nn.Linear, y: Tensor, chunks: list[slice]) -> Tensor:
    dx, losses = torch.empty_like(x, requires_grad=False), []
    with torch.no_grad():
        for c in chunks:
            logits = head(x[c])
            losses.append(_row_losses(logits, y[c]))
            _loss(logits, y[c], logits)
            torch.mm(logits, head.weight, out=dx[c])
    return _KnownRows.apply(torch.cat(losses), dx, x)  # type: ignore[no-any-return]


@torch.no_grad()
def _loss(logits: Tensor, targets: Tensor, slopes: Tensor | None = None) -> Tensor:
    """The loss of logits [c, v], block by block; ∂loss/∂logits goes into `slopes` [c, v], which may be the logits' own memory."""
    rows = max(1, BLOCK.get(logits.device.type, BLOCK["cpu"]) // logits.shape[-1])
    losses = []
    for i in range(0, max(1, len(logits)), rows):
        c = slice(i, i + rows)
        wide, ignored = logits[c].to(_wide(logits)).log_softmax(-1), (targets[c] == IGNORED).unsqueeze(-1)
        at = targets[c].unsqueeze(-1).masked_fill(ignored, 0)
        log_p = wide.gather(-1, at)  # [rows, 1]
        losses.append(-log_p.masked_fill(ignored, 0).sum())
        if slopes is not None:
            softmax_less_onehot = wide.exp_().scatter_(-1, at, log_p.expm1())
            slopes[c] = softmax_less_onehot.masked_fill_(ignored, 0)
    return _sum(losses)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _sum(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum()


# ------------------------------------------------------------------------------------------------------- a frozen dense head
def _frozen(head: nn.Linear, x: Tensor) -> bool:
    """Whether head(x) is x Wᵀ + bias and nothing else, with nothing to learn in it."""
    exact = type(head) is nn.Linear and head.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)
    return exact and not any(p.requires_grad for p in head.parameters())


def _closed(x: Tensor, head: nn.Linear, y: Tensor, chunks: list[slice]) -> Tensor:
    W, bias = head.weight, head.bias
    dx, room = torch.empty_like(x, requires_grad=False), x.new_empty(len(x[chunks[0]]), len(W))
    losses = []
    with torch.no_grad():
        for c in chunks:
            logits = room[: len(x[c])]
            torch.mm(x[c], W.T, out=logits) if bias is None else torch.addmm(bias, x[c], W.T, out=logits)
            losses.append(_loss(logits, y[c], logits))
            torch.mm(logits, W, out=dx[c])
    return _known(_sum(losses), [x], [dx])


# ------------------------------------------------------------------------------------------------------------ any other head
def _traced(x: Tensor, head: nn.Linear, y: Tensor, chunks: list[slice]) -> Tensor:
    """Through the head's own graph. What learns in it may be registered elsewhere (a pool that sites share), so the first chunk's graph is
    asked."""
    graphs = (_graph(x[c], head) for c in chunks)
    part, logits = first = next(graphs)
    trained = [leaf for leaf in _leaves(logits) if leaf is not part]
    if any(leaf._backward_hooks for leaf in trained):  # they would be called here and again in backward
        whole = head(x)
        return F.cross_entropy(whole.to(_wide(whole)), y, ignore_index=IGNORED, reduction="sum")
    dx, sums = torch.empty_like(x, requires_grad=False), [torch.zeros_like(t, dtype=_wide(t), requires_grad=False) for t in trained]
    room = torch.empty_like(logits, requires_grad=False)
    losses: list[Tensor] = []
    for c, (part, logits) in zip(chunks, itertools.chain([first], graphs), strict=True):
        slopes = room[: len(logits)]
        losses.append(_loss(logits, y[c], slopes))
        wanted = ([part] if x.requires_grad else []) + trained
        grads = list(torch.autograd.grad(logits, wanted, slopes)) if wanted else []
        if x.requires_grad:
            dx[c] = grads.pop(0)
        for total, grad in zip(sums, grads, strict=True):
            total += grad
    inputs = ([x] if x.requires_grad else []) + trained
    found = ([dx] if x.requires_grad else []) + [total.to(t.dtype) for total, t in zip(sums, trained, strict=True)]
    return _known(_sum(losses), inputs, found)


def _graph(x: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """The rows as a leaf, and their logits."""
    part = x.detach().requires_grad_(x.requires_grad)
    return part, head(part)


def _leaves(logits: Tensor) -> list[Tensor]:
    """The tensors that logits have gradients for, in the order of their first use."""
    found, seen, stack = list[Tensor](), set[Node](), [logits.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of the node that accumulates a leaf's gradient
        found += [] if leaf is None else [leaf]
        stack += [below for below, _ in node.next_functions]
    return found


# ------------------------------------------------------------------------------------------------------------------ backward
class _Known(torch.autograd.Function):
    """A scalar whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients would pass for constants, and what follows be wrong
            raise RuntimeError("the chunked loss has a first derivative only; for a second one take reference.head_loss, or whole logits")
        return None, None, *(grad * dy.to(grad.dtype) for grad in ctx.saved_tensors)


def _known(value: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
    """`value`, which backward differentiates by `inputs` into `grads`."""
    return _Known.apply(value, grads, *inputs)  # type: ignore[no-any-return]


class _KnownRows(torch.autograd.Function):
    """A value [n] of each row of x [n, d], whose gradients for their own rows are known."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError("the chunked losses have a first derivative only; for a second one take whole logits")
        (grad,) = ctx.saved_tensors
        return None, None, (grad * dy.unsqueeze(-1)).to(grad.dtype)
