"""Adapter modules written plainly and hung on a fresh model by hooks: what the methods must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import Adapted
from tests.laws.subject import base

ENTRANCE = {
    "mlp.down_proj": "mlp.up_proj",
    "self_attn.o_proj": "self_attn.q_proj",
    "mlp.dense_4h_to_h": "mlp.dense_h_to_4h",
    "attention.dense": "attention.query_key_value",
    "mlp.c_proj": "mlp.c_fc",
    "attn.c_proj": "attn.c_attn",
}
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


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss in fp64, where Transformers' own rounds the logits."""
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def apart(adapted: Adapted, twin: nn.Module, *, steps: int = 50) -> float:
    """The largest difference of losses when both are trained by AdamW, each on its own parameters."""
    rng = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 128, (2, 12), generator=rng) for _ in range(5)]  # something to learn by heart
    ours = [p.tensor for p in adapted.params()]
    theirs = list({id(p): p for n, p in twin.named_parameters() if ".plain." in n}.values())
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.01) for ps in (ours, theirs)]
    history: list[tuple[float, ...]] = []
    for i in range(steps):
        losses = [loss(model, batches[i % 5]) for model in (adapted.model, twin)]
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        history.append(tuple(value.item() for value in losses))
    assert history[-1][0] < history[steps % 5][0] - 0.1, "it did train"
    return max(abs(a - b) for a, b in history)
