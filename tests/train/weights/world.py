"""What the tests of this folder search in: one linear layer whose loss is ‖ΔW − ΔW*‖², and tiny models with a few adapters each."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import Adapter
from lorakit.adapters.plain import plain_lora
from lorakit.core.attach import attach_adapter
from lorakit.core.delta import Factors
from lorakit.core.site import Site
from lorakit.train.weights.objective import Objective
from tests.adapters.subject import IDS, logits, shaken, tiny_model

D_OUT, D_IN = 10, 12
SITE = Site("w", "linear", D_IN, D_OUT, None, "other")


def layer() -> nn.Module:
    """One linear layer w, fp64; the same bits on every call."""
    host = nn.Linear(D_IN, D_OUT).double()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in host.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return nn.ModuleDict({"w": host})


def update(seed: int, r: int = 2, s: float = 0.5) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, D_IN, generator=rng), torch.randn(D_OUT, r, generator=rng), s)


def dense(f: Factors) -> Tensor:
    return f.s * f.B.double() @ f.A.double()


def adapter(f: Factors) -> Adapter:
    return plain_lora([SITE], {"w": f}, {})


def on_layer(model: Any) -> Tensor:
    """W + ΔW of the layer as it is, through its forward: [d_out, d_in]."""
    x = torch.eye(D_IN, dtype=torch.float64)
    return (model["w"](x) - model["w"].bias).T


def distance(target: Tensor) -> Objective:
    """‖W' − W − target‖², the number of labels being 1."""
    W = layer()["w"].weight.detach()

    def loss(model: nn.Module) -> Iterable[tuple[Tensor, int]]:
        return [((on_layer(model) - W - target).square().sum(), 1)]

    return loss


def some(arch: str = "llama", n: int = 3, *, seed: int = 0, size: float = 1.0, **options: Any) -> list[Adapter]:
    """Adapters with random tensors, all of another rank unless `r` is given."""
    made = [shaken(tiny_model(arch), "lora", seed=seed + i, **({"r": 2 + i} | options)).state() for i in range(n)]
    for one in made:
        for t in one.tensors.values():
            t.mul_(size)
    return made


def with_adapter(model: nn.Module, one: Adapter, ids: Tensor = IDS) -> Tensor:
    """The model's logits with a finished adapter; it is as it was afterwards."""
    adapted = attach_adapter(model, one, force=True)
    try:
        return logits(model, ids)
    finally:
        adapted.detach()


def toward(target: Tensor, ids: Tensor = IDS) -> Objective:
    """The squared distance of the model's logits from others, a label for each position."""

    def loss(model: nn.Module) -> Iterable[tuple[Tensor, int]]:
        return [((model(input_ids=ids).logits - target).square().sum(), ids.numel())]

    return loss


def predicts(ids: Tensor = IDS) -> Objective:
    """Cross-entropy of the next token, a batch for each row."""

    def loss(model: nn.Module) -> Iterable[tuple[Tensor, int]]:
        for row in ids:
            z = model(input_ids=row[None]).logits[0, :-1]
            yield nn.functional.cross_entropy(z, row[1:], reduction="sum"), len(row) - 1

    return loss


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - other).norm()) <= tolerance * float(other.norm())


def counted(objective: Objective) -> tuple[Objective, list[bool]]:
    """The objective, and for each evaluation whether gradients were on."""
    calls: list[bool] = []

    def loss(model: nn.Module) -> Iterable[tuple[Tensor, int]]:
        calls.append(torch.is_grad_enabled())
        return objective(model)

    return loss, calls


def bits(adapters: Iterable[Adapter]) -> list[dict[str, Tensor]]:
    return [{k: v.clone() for k, v in one.tensors.items()} for one in adapters]


def same_bits(before: list[dict[str, Tensor]], adapters: Iterable[Adapter]) -> bool:
    return all(torch.equal(was[k], one.tensors[k]) for was, one in zip(before, adapters, strict=True) for k in was)


Find = Callable[..., Any]
