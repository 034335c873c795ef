"""Inputs and output gradients of A and B at every site, while a block runs: what both the curvature and the Jacobians are made of."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.core.errors import Incompatible
from lorakit.core.layer import Branch
from lorakit.core.lowrank import LowRank


class Seen(NamedTuple):
    """One backward through one site, tokens in their places: [b, .., d]."""

    x: Tensor
    """A's input, d_in."""
    dz: Tensor
    """The gradient of A's output, r."""
    z: Tensor
    """B's input, s A x, r."""
    dy: Tensor
    """The gradient of B's output, d_out."""


@contextmanager
def traced(branches: Sequence[Branch], sink: Callable[[str, Seen], None]) -> Iterator[None]:
    """`sink(site, seen)` is called at every backward through a site; ids are one-hot rows. Raises Incompatible without a plain pair."""
    check_plain(branches)
    hooks = [b.delta.register_forward_hook(_hook(b, sink)) for b in branches]
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled backward runs once, and this one once a class
            yield
    finally:
        for hook in hooks:
            hook.remove()


def check_plain(branches: Sequence[Branch]) -> None:
    """Raise Incompatible unless every site has a plain pair."""
    for branch in branches:
        delta = branch.delta
        if not isinstance(delta, LowRank) or delta.g is not None or delta.A0 is not None:
            raise Incompatible(f"the posterior is over plain pairs of A and B; {branch.site.name} has another delta")


def _hook(branch: Branch, sink: Callable[[str, Seen], None]) -> Callable[..., None]:
    def forward(module: LowRank, args: tuple[Tensor, Any], out: Tensor) -> None:
        x = args[0].detach()
        x = x if x.is_floating_point() else F.one_hot(x, branch.site.d_in).to(out.dtype)

        def backward(dy: Tensor) -> None:
            dy = dy.detach()
            A, B = module.A.detach().to(x.dtype), module.B.detach().to(dy.dtype)
            sink(branch.site.name, Seen(x, module.s * (dy @ B), module.s * (x @ A.T), dy))

        if out.requires_grad:
            out.register_hook(backward)

    return forward


def backward(scalar: Tensor, branches: Sequence[Branch]) -> None:
    """Send a scalar's gradient through every site, for the sinks alone: nothing is accumulated."""
    ends: list[Tensor] = [b.delta.get_parameter("B") for b in branches]
    torch.autograd.grad(scalar, ends, retain_graph=True, allow_unused=True)
