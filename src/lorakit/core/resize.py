"""The one way a trained tensor changes its shape during a run: the parameter is replaced, and the optimizer's state goes with it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def replace(
    optimizer: torch.optim.Optimizer | None, module: nn.Module, name: str, new: Tensor, carry: Callable[[Tensor], Tensor]
) -> nn.Parameter:
    """Put `new` in place of the parameter; every state tensor of the old one's shape becomes `carry(state)`, the others stay."""
    old: nn.Parameter = getattr(module, name)
    fresh = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, fresh)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [fresh if p is old else p for p in group["params"]]
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            same = {k: isinstance(v, Tensor) and v.shape == old.shape for k, v in state.items()}
            optimizer.state[fresh] = {k: carry(v) if same[k] else v for k, v in state.items()}
    return fresh


def append(optimizer: torch.optim.Optimizer | None, module: nn.Module, name: str, values: Tensor, dim: int) -> nn.Parameter:
    """Append `values` along `dim`; their state starts at zero."""
    old: nn.Parameter = getattr(module, name)
    new = torch.cat([old.detach(), values.to(old)], dim)
    return replace(optimizer, module, name, new, lambda state: torch.cat([state, torch.zeros_like(values, dtype=state.dtype)], dim))


def keep(optimizer: torch.optim.Optimizer | None, module: nn.Module, name: str, index: Tensor, dim: int) -> nn.Parameter:
    """Keep the rows (or columns) in `index` along `dim`."""
    old: nn.Parameter = getattr(module, name)
    return replace(optimizer, module, name, old.detach().index_select(dim, index), lambda state: state.index_select(dim, index))
