"""A mixture's router: W [experts, d_in] scores a token's experts inside the router's own forward, which goes on to choose among them.

There is no output of W alone to add to, so the adapted forward reads W + Σ ΔW, which is small, in W's place. A router therefore knows no
dropout on its input. No preset but "router" means one: an adapter that moves tokens between experts changes more than a layer.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.generated import plain_type


def routes(module: nn.Module) -> bool:
    """Whether it is one of Transformers 5's routers with a weight of its own."""
    weight = module._parameters.get("weight")
    return plain_type(module).__name__.lower().endswith("topkrouter") and weight is not None and weight.ndim == 2


def router_forward(plain: type[nn.Module]) -> Callable[..., Any]:
    """The adapted class's forward."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot: Any = self.lora
        if not slot.active:
            return plain.forward(self, *args, **kwargs)
        weight: Tensor = self.weight  # type: ignore[assignment]
        changes = [slot.branches[key].weight() for key in slot.active]
        self.__dict__["weight"] = reduce(torch.add, changes, weight.to(changes[0].dtype)).to(weight.dtype)  # shadows the parameter
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            del self.__dict__["weight"]

    return forward
