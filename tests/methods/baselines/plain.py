"""Adapter modules written plainly and hung on a fresh model by hooks: what the methods must equal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorakit import Adapted
from tests.laws.subject import base

ENTRANCE = {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.q_proj", "mlp.dense_4h_to_h": "mlp.dense_h_to_4h"}
"""Whose input is the input of the block that ends here."""


class Module(nn.Module):
    """s · (B f(A n(h) + a) + b)."""

    def __init__(self, A: Tensor, a: Tensor, B: Tensor, b: Tensor, *, f: nn.Module, s: float = 1.0, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(*A.T.shape).to(A), nn.Linear(*B.T.shape).to(B)
        self.down.load_state_dict({"weight": A, "bias": a})
        self.up.load_state_dict({"weight": B, "bias": b})
        self.f, self.s, self.norm = f, s, norm or nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return self.s * self.up(self.f(self.down(self.norm(h))))


def hung(arch: str, modules: dict[str, nn.Module], *, beside: bool = False, **overrides: object) -> nn.Module:
    """A fresh fp64 model with one module a site: on what it puts out, or on what goes into its block."""
    model = base(arch, torch.float64, **overrides)
    for path, module in modules.items():
        host = model.get_submodule(path)
        host.plain = module
        if not beside:
            host.register_forward_hook(lambda m, _, y: y + m.plain(y))
            continue
        (ending,) = [e for e in ENTRANCE if path.endswith(e)]
        seen: list[Tensor] = []
        model.get_submodule(path.removesuffix(ending) + ENTRANCE[ending]).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        host.register_forward_hook(lambda m, _, y, seen=seen: y + m.plain(seen.pop()))
    return model


def dense(adapted: Adapted, f: nn.Module) -> dict[str, nn.Module]:
    """The plain twins of an adapter's dense modules."""
    twins: dict[str, nn.Module] = {}
    for branch in adapted.branches():
        d = branch.delta
        norm = None
        if d.norm_weight is not None:
            norm = nn.LayerNorm(d.width).to(d.norm_weight)
            norm.load_state_dict({"weight": d.norm_weight, "bias": d.norm_bias})
        twins[branch.site.module] = Module(d.A.detach(), d.a.detach(), d.B.detach(), d.b.detach(), f=f, s=d.s, norm=norm)
    return twins


class Kronecker(nn.Module):
    """x Σ_i kron(R_i, S_i T_i) + b, formed by torch's own kron; R is one parameter of all."""

    def __init__(self, R: nn.Parameter, S: Tensor, T: Tensor, b: Tensor) -> None:
        super().__init__()
        self.R = R
        self.S, self.T, self.b = (nn.Parameter(t.detach().clone()) for t in (S, T, b))

    def forward(self, x: Tensor) -> Tensor:
        H = torch.stack([torch.kron(R, S @ T) for R, S, T in zip(self.R, self.S, self.T, strict=True)]).sum(0)
        return x @ H + self.b


def kronecker(adapted: Adapted, f: nn.Module) -> dict[str, nn.Module]:
    """The plain twins of an adapter's hypercomplex modules."""
    R = nn.Parameter(adapted.shared("default")["pool"].R.detach().clone())
    return {
        b.site.module: nn.Sequential(Kronecker(R, b.delta.AS, b.delta.AT, b.delta.a), f, Kronecker(R, b.delta.BS, b.delta.BT, b.delta.b))
        for b in adapted.branches()
    }


def apart(adapted: Adapted, twin: nn.Module, batches: list[Tensor], loss: Callable[[nn.Module, Tensor], Tensor]) -> float:
    """The largest difference of losses when both are trained by AdamW, each on its own parameters."""
    ours = [p.tensor for p in adapted.params()]
    theirs = list({id(p): p for n, p in twin.named_parameters() if ".plain." in n}.values())
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    gaps, first, last = [], 0.0, 0.0
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.01) for ps in (ours, theirs)]
    for i, ids in enumerate(batches):
        losses = [loss(m, ids) for m in (adapted.model, twin)]
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        first, last = (losses[0].item() if i == 0 else first), losses[0].item()
        gaps.append(abs(losses[0].item() - losses[1].item()))
    assert last < first - 0.1, "it did train"
    return max(gaps)


