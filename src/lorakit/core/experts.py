"""The experts of a mixture, stacked: W is E × d_out × d_in, A [E, r, d_in], B [E, d_out, r], one low-rank pair for each expert.

Transformers 5 keeps a layer's experts in one module with two parameters, which its forward reads directly: there is no output of a weight
to add to. While an adapter is active the module runs the forward below instead, which does what all of its own do (eager, batched_mm,
grouped_mm), with rows sorted by expert. For x [n, d] and a token's k experts e with their router's weights p:

    out = Σ_e p_e · down_e(act(gate_e(x)) ∘ up_e(x))        every one of them  x W_eᵀ + bias_e + Σ changes
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

FLAGS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"}
"""What Transformers' `use_experts_implementation` sets on a module: that its own forward is the sorted one, and which form of it."""
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def stacked(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's stacked weights, in the order of its forward; none where they are stored in another form."""
    if not vars(module).keys() >= FLAGS:
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [module._parameters.get(name) for name in names]
    return names if all(w is not None and w.ndim == 3 and w.dtype in PLAIN for w in weights) else ()


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(E, d_out, d_in) of a stacked weight."""
    experts, rows, cols = module.get_parameter(name).shape
    return (experts, cols, rows) if module.is_transposed else (experts, rows, cols)


def sorting(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token's experts [n, k]: the order that sorts all n·k rows by expert, each row's expert then, and where each expert's end."""
    expert, order = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=index.device), right=True)
    return order, expert, ends.to(torch.int32)


def mixed(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The forward of an adapted module: x [n, d], its experts and their weights [n, k] -> [n, d]. It needs what `stacked` recognized."""
    up, down = module.lora.values()
    n, k = index.shape
    order, expert, ends = sorting(index, up.base.experts)
    h = _changed(up, x[order // k], expert, ends)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = _changed(down, h, expert, ends)
    y = module.post_expert_norm(y) if module.has_post_expert_norm else y
    y = y * weights.reshape(-1)[order, None]
    return y[torch.argsort(order)].view(n, k, y.shape[-1]).sum(dim=1).to(x.dtype)


def _changed(slot: Any, x: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """What one weight makes of rows sorted by expert, its active adapters included."""
    base = slot.base
    y = base.matmul(x.to(base.dtype), ends)
    y = y if base.bias is None else y + base.bias[expert].to(y.dtype)
    ctx = replace(slot.cell.value, ends=ends)
    changes: list[Tensor] = [slot.branches[key](x.to(base.dtype), y, ctx) for key in slot.active]
    return sum(changes, y)


def forward_of(plain: type[nn.Module]) -> Callable[..., Tensor]:
    """The adapted class's forward: its own as long as no adapter is active."""

    def forward(self: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        slots: Any = self.lora
        own = not any(slot.active for slot in slots.values())
        return plain.forward(self, x, index, weights) if own else mixed(self, x, index, weights)

    return forward
