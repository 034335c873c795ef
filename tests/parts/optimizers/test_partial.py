"""A partial step leaves the rest of a parameter, and the optimizer's state of it, bit for bit as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakit.parts.optimizers.partial import Partial
from tests.laws.subject import same_bits
from tests.methods.tools import normal

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": torch.optim.Adafactor,
}


def stepped(name: str, masks: list[Tensor], *, partial: bool = True, masked: bool = True) -> list[dict[str, Tensor]]:
    """The parameter and its state after a full step and after one step for each mask. Mutants only mask the gradient, or nothing."""
    p = nn.Parameter(normal(4, 5))
    optimizer, keeper, seen = OPTIMIZERS[name]([p]), Partial(), []
    for i, mask in enumerate([torch.ones(4, 1, dtype=torch.bool), *masks]):
        p.grad = normal(4, 5, seed=9 + i)
        if partial:
            keeper.before(optimizer, [(p, mask)])
        elif masked:
            p.grad.masked_fill_(~mask, 0.0)
        optimizer.step()
        keeper.after()
        state = {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape}
        seen.append({k: v.detach().clone() for k, v in {"p": p, **state}.items()})
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_what_the_mask_says_moves(name: str) -> None:
    mask = torch.tensor([True, False, True, False])[:, None]
    first, second = stepped(name, [mask])
    for key, before in first.items():
        assert same_bits(second[key][~mask[:, 0]], before[~mask[:, 0]]), key
        assert not torch.equal(second[key][mask[:, 0]], before[mask[:, 0]]), key
    assert len(first) == {"adamw": 3, "momentum": 2, "adafactor": 1}[name]


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_a_masked_gradient_alone_is_not_enough(name: str) -> None:
    mask = torch.tensor([True, False, True, False])[:, None]
    first, second = stepped(name, [mask], partial=False)
    assert not torch.equal(second["p"][~mask[:, 0]], first["p"][~mask[:, 0]])


def test_what_moves_moves_as_in_a_whole_step() -> None:
    mask = torch.tensor([True, False, True, False])[:, None]
    part, whole = stepped("adamw", [mask])[1]["p"], stepped("adamw", [mask], partial=False, masked=False)[1]["p"]
    assert same_bits(part[mask[:, 0]], whole[mask[:, 0]])


def test_columns_too_and_nothing_is_held_after() -> None:
    p, keeper = nn.Parameter(normal(4, 5)), Partial()
    before, optimizer = p.detach().clone(), torch.optim.SGD([p], lr=0.1)
    p.grad = normal(4, 5, seed=2)
    mask = torch.tensor([False, True, False, False, True])
    keeper.before(optimizer, [(p, mask)])
    optimizer.step()
    keeper.after()
    assert ((p.detach() != before).all(0) == mask).all()
    assert not keeper.held
