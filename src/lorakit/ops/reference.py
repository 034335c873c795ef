"""The definition of each hot operation, in plain torch. Shapes: x [.., d_in], A [r, d_in], B [d_out, r]."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ: [.., d_in] -> [.., r]; integer x holds ids, that is, one-hot rows: [..] -> [.., r]."""
    return F.linear(x, A) if x.is_floating_point() else F.embedding(x, A.T)


def expand(z: Tensor, B: Tensor, s: float) -> Tensor:
    """s z Bᵀ: [.., r] -> [.., d_out]. The scale sits on the r-wide side."""
    return F.linear(z * s, B)


def low_rank(x: Tensor, A: Tensor, B: Tensor, s: float, g: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """s · b ∘ B (g ∘ A x) in x's dtype (ids: in B's): [.., d_in] -> [.., d_out], ids [..] -> [.., d_out]. g [r], b [d_out]."""
    dtype = x.dtype if x.is_floating_point() else B.dtype
    z = project(x, A.to(dtype))
    y = expand(z if g is None else z * g.to(dtype), B.to(dtype), s)
    return y if b is None else y * b.to(dtype)


def lora_linear(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    *,
    g: Tensor | None = None,
    b: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """γ ∘ (W x + s · b ∘ B (g ∘ A (mask ∘ x))) + bias: [.., d_in] -> [.., d_out]. W [d_out, d_in], gain γ and bias [d_out]; `mask` holds
    zeros and 1 / (1 − p)."""
    y = F.linear(x, W) + low_rank(x if mask is None else x * mask, A, B, s, g, b)
    y = y if gain is None else y * gain.to(y.dtype)
    return y if bias is None else y + bias


def row_norm(w2: Tensor, WA: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s·B·A‖ by rows, without forming it: [d_out]. w2 = ‖W‖² by rows [d_out], WA = W Aᵀ [d_out, r].

    ‖w_i + s·b_i A‖² = ‖w_i‖² + 2s ⟨w_i Aᵀ, b_i⟩ + s² b_i (A Aᵀ) b_iᵀ
    """
    cross = (WA * B).sum(-1)
    square = ((B @ (A @ A.T)) * B).sum(-1)
    return (w2 + 2 * s * cross + s * s * square).clamp_min(0).sqrt()


def scaled(x: Tensor, A: Tensor, d: Tensor, B: Tensor, b: Tensor) -> Tensor:
    """x (diag(b) B diag(d) A)ᵀ: [.., d_in] -> [.., d_out]; ids [..] -> [.., d_out]."""
    return F.linear(project(x, A) * d, B) * b


def choose(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last dimension as (weights that sum to one, indices): [.., h] -> [.., k] twice."""
    top = logits.topk(k, dim=-1)
    return top.values.softmax(-1), top.indices


def compose(weights: Tensor, indices: Tensor, V: Tensor) -> Tensor:
    """Σ_k weights_k V[indices_k]: [.., k], [.., k], bank [h, b] -> [.., b]."""
    return (weights.unsqueeze(-1) * F.embedding(indices, V)).sum(-2)


def mixture(x: Tensor, g: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """s Σ_i g_i x A_iᵀ B_iᵀ: gates g [.., N], A [N, r, d_in], B [N, d_out, r] -> [.., d_out]."""
    z = project(x, A.flatten(0, 1)).unflatten(-1, A.shape[:2]) * g.unsqueeze(-1)  # [.., N, r]
    return expand(z.flatten(-2), B.transpose(0, 1).flatten(1), s)


def kronecker(x: Tensor, w1: Tensor, w2: Tensor, s: float) -> Tensor:
    """s x (w1 ⊗ w2)ᵀ for w1 [a1, a2], w2 [b1, b2], the product never formed: [.., a2 b2] -> [.., a1 b1], ids [..] -> [.., a1 b1].

    With X: a2 × b2 the entries of x row by row, it is w1 X w2ᵀ row by row, multiplied in the cheaper order.
    """
    (a1, a2), (b1, b2) = w1.shape, w2.shape
    if not x.is_floating_point():  # the column of the product at each id
        return (F.embedding(x // b2, w1.T * s).unsqueeze(-1) * F.embedding(x % b2, w2.T).unsqueeze(-2)).flatten(-2)
    X = x.unflatten(-1, (a2, b2))
    if a2 * b1 * (b2 + a1) <= a1 * b2 * (a2 + b1):
        z = F.linear(X, w2) * s  # [.., a2, b1]
        return F.linear(z.mT, w1).mT.flatten(-2)
    z = F.linear(X.mT, w1) * s  # [.., b2, a1]
    return F.linear(z.mT, w2).flatten(-2)


def grouped(x: Tensor, W: Tensor, ends: Tensor) -> Tensor:
    """x_i W_{e(i)}ᵀ of rows that are sorted by expert: [n, d_in], [E, d_out, d_in] -> [n, d_out]. ends [E]: expert e has the rows
    ends[e − 1] up to ends[e]."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), W, strict=True)])


def head_loss(h: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """Σ −log softmax(head(h))[target] in at least fp32: [.., d], d -> v, [..] -> scalar. A target of −100 adds nothing."""
    logits = head(h).flatten(0, -2)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten(), reduction="sum")


def head_losses(h: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """−log softmax(head(h))[target] of each row in at least fp32: [n, d], d -> v, [n] -> [n]. A target of −100 gives 0."""
    logits = head(h)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, *, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v where query i sees the keys first[i] to i: q [b, h, t, d]; k, v [b, h_kv, t, d] -> [b, h, t, d].

    Each key-value head serves h / h_kv heads in a row. first [b, t], integers: None stands for 0.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    place = torch.arange(q.shape[2], device=q.device)
    start = torch.zeros_like(place)[None] if first is None else first
    seen = (start[:, None, :, None] <= place) & (place <= place[:, None])
    scores = (scale * (q @ k.mT)).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v
