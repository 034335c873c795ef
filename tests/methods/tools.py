"""One linear layer with whitened inputs: its loss is ‖ΔW − ΔW*‖²_F exactly, so that optima have closed forms."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorakit import Adapted, Method, attach


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def teacher(d_out: int, d_in: int, singular_values: list[float], *, seed: int = 1) -> Tensor:
    """A matrix with these singular values: [d_out, d_in], fp64."""
    k = len(singular_values)
    U, V = (torch.linalg.qr(normal(d, k, seed=seed + i)).Q for i, d in enumerate((d_out, d_in)))
    return U * torch.tensor(singular_values, dtype=torch.float64) @ V.T


def layer(
    method: Method, *, d_in: int = 12, d_out: int = 10, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Adapted:
    """`method` on a model of one linear layer."""
    host = nn.Linear(d_in, d_out).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(host.parameters()):
            p.copy_(normal(*p.shape, seed=100 + seed + i))
    return attach(nn.ModuleDict({"w": host}), method, seed=seed)


def whole(adapted: Adapted) -> Tensor:
    """W' = W + ΔW of the only layer, through its forward on the identity, bias taken off: [d_out, d_in], differentiable."""
    host = adapted.model.w
    out = host(torch.eye(host.in_features, dtype=host.weight.dtype))
    return (out - host.bias).T


def minimize(adapted: Adapted, loss: Callable[[], Tensor], *, steps: int = 40) -> float:
    """The loss after LBFGS over all trainable tensors."""
    tensors = [p.tensor for p in adapted.params()]
    settings = {"max_iter": 100, "tolerance_grad": 1e-14, "tolerance_change": 1e-18, "history_size": 30, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(tensors, **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(closure)
    return loss().item()


def fit(adapted: Adapted, target: Tensor) -> float:
    """Least ‖ΔW − target‖²_F that training finds."""
    W = adapted.model.w.weight.detach().clone()
    return minimize(adapted, lambda: (whole(adapted) - W - target).square().sum())
