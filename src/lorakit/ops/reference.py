"""The definition of each hot operation, in plain torch. Shapes: x [.., d_in], A [r, d_in], B [d_out, r]."""

import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ: [.., d_in] -> [.., r]; integer x holds ids, that is, one-hot rows: [..] -> [.., r]."""
    return F.linear(x, A) if x.is_floating_point() else F.embedding(x, A.T)


def expand(z: Tensor, B: Tensor, s: float) -> Tensor:
    """s z Bᵀ: [.., r] -> [.., d_out]. The scale sits on the r-wide side."""
    return F.linear(z * s, B)


def row_norm(w2: Tensor, WA: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """‖W + s·B·A‖ by rows, without forming it: [d_out]. w2 = ‖W‖² by rows [d_out], WA = W Aᵀ [d_out, r].

    ‖w_i + s·b_i A‖² = ‖w_i‖² + 2s ⟨w_i Aᵀ, b_i⟩ + s² b_i (A Aᵀ) b_iᵀ
    """
    cross = (WA * B).sum(-1)
    square = ((B @ (A @ A.T)) * B).sum(-1)
    return (w2 + 2 * s * cross + s * s * square).clamp_min(0).sqrt()
