"""`reference.head_loss` some rows at a time: the summed next-token loss of hidden states through a model's head, and its gradients with it.

    loss = Σ_i −log softmax(head(h_i))[t_i]        ∂loss/∂head(h_i) = softmax(head(h_i)) − onehot(t_i)       h [.., d], t [..], head: d -> v

Each chunk's logits [c, v] yield the chunk's loss and at once its gradients, and are gone before the next chunk's. They are never computed
twice: forward leaves gradients of the sizes of h and of what is trained in the head, and backward multiplies those by the incoming scalar.
A frozen dense head goes by the closed form above; any other is run under autograd, a chunk at a time.

References: arXiv:2410.10989 (gradients in forward); arXiv:2411.09009 (cut cross-entropy).
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

IGNORED = -100
"""The target of a row without a loss: torch's own default."""
CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Logits of a chunk, 32 MB and 256 MB in fp32."""
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


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(_wide(logits)), targets, ignore_index=IGNORED, reduction="sum")


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
    dx = torch.empty_like(x, requires_grad=False)
    with torch.no_grad():
        loss = _sum([_closed_chunk(x[c], head, y[c], dx[c]) for c in chunks])
        dx.masked_fill_((y == IGNORED).unsqueeze(-1), 0)
    return _known(loss, [x], [dx])


def _closed_chunk(x: Tensor, head: nn.Linear, y: Tensor, dx: Tensor) -> Tensor:
    """The loss of rows x [c, d]; their gradient goes into dx [c, d], also for ignored rows."""
    wide = torch.log_softmax(F.linear(x, head.weight, head.bias), -1, dtype=_wide(x))  # [c, v]
    ignored = y == IGNORED
    at = y.masked_fill(ignored, 0).unsqueeze(-1)
    log_p = wide.gather(-1, at)  # [c, 1]
    wide.exp_().scatter_(-1, at, log_p.expm1())  # softmax − onehot
    torch.mm(wide.to(x.dtype), head.weight, out=dx)
    return -log_p.squeeze(-1).masked_fill(ignored, 0).sum()


# ------------------------------------------------------------------------------------------------------------ any other head
def _traced(x: Tensor, head: nn.Linear, y: Tensor, chunks: list[slice]) -> Tensor:
    """Through the head's own graph. What learns in it may be registered elsewhere (a pool that sites share), so the first chunk's graph is
    asked."""
    graphs = (_graph(x[c], head, y[c]) for c in chunks)
    part, loss = first = next(graphs)
    trained = [leaf for leaf in _leaves(loss) if leaf is not part]
    if any(leaf._backward_hooks for leaf in trained):  # they would be called here and again in backward
        return _loss(head(x), y)
    dx, sums = torch.empty_like(x, requires_grad=False), [torch.zeros_like(t, dtype=_wide(t), requires_grad=False) for t in trained]
    losses: list[Tensor] = []
    for c, (part, loss) in zip(chunks, itertools.chain([first], graphs), strict=True):
        losses.append(loss.detach())
        wanted = ([part] if x.requires_grad else []) + trained
        grads = list(torch.autograd.grad(loss, wanted)) if wanted else []
        if x.requires_grad:
            dx[c] = grads.pop(0)
        for total, grad in zip(sums, grads, strict=True):
            total += grad
    inputs = ([x] if x.requires_grad else []) + trained
    found = ([dx] if x.requires_grad else []) + [total.to(t.dtype) for total, t in zip(sums, trained, strict=True)]
    return _known(_sum(losses), inputs, found)


def _graph(x: Tensor, head: nn.Linear, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows as a leaf, and their loss."""
    part = x.detach().requires_grad_(x.requires_grad)
    return part, _loss(head(part), y)


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that the loss has gradients for, in the order of their first use."""
    found, seen, stack = list[Tensor](), set[Node](), [loss.grad_fn]
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
