"""Adapted linear layers as one autograd function: y = γ ∘ (W x + s · b ∘ (B (g ∘ A x̃))) + bias, x̃ = x without what a mask drops.

Several layers that read one x go through together: one product with all A, and one gradient for x, to which every W adds in place. Nothing
is kept that backward can make again: x where an A is trained, A x where what follows it is, the inner sum where γ is. Masks are made again.
The scale sits on the r-wide side, and nothing d_out wide is written twice. `reference.lora_linear` is the definition.

The order of products follows the shape, as arXiv:2312.03415 chooses it: B (A x) and B A cost the same for n = d_in tokens. With more of
them W + ΔW is formed and multiplied once, in backward with more than d_out. Only where W is as wide as A and B: a narrow sum would round
ΔW away.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops import cpu, triton
from lorakit.ops.mask import Mask


class Layer(NamedTuple):
    """One adapted layer: A [r, d_in], B [d_out, r], g [r], b, gain γ and bias [d_out]; None where there is none."""

    frozen: Callable[[Tensor], Tensor]
    """x -> W x + bias, [.., d_in] -> [.., d_out]: the module's own, so that a change of nothing keeps its bits."""
    matmul_t: Callable[[Tensor, Tensor | None], Tensor]
    """(dy, dx) -> dy W, [n, d_out] -> [n, d_in], added to dx in place where that is given."""
    s: float
    A: Tensor
    B: Tensor
    g: Tensor | None = None
    b: Tensor | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    mask: Mask | None = None
    dense: Callable[[], Tensor] | None = None
    """W [d_out, d_in] itself, where adding ΔW to it loses nothing: stored so, and as wide as A and B."""


ROWS = 64
"""Added at a time: what their columns sum up to stays in a CPU's cache."""
TENSORS = ("A", "B", "g", "b", "gain", "bias")


def lora_linear(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Every layer's output [.., d_out] of the one x [.., d_in], in x's dtype. Gradients for x and for every tensor of the layers."""
    tensors = [getattr(layer, name) for layer in layers for name in TENSORS]
    settings = [layer._replace(**dict.fromkeys(TENSORS)) for layer in layers]  # type: ignore[arg-type]
    return _LoraLinear.apply(x, settings, *tensors)  # type: ignore[no-any-return]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: list[Layer], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        layers = _filled(settings, tensors)
        outputs, kept = list[Tensor](), list[Tensor | None]()
        for layer, z in zip(layers, _down(x.reshape(-1, x.shape[-1]), layers), strict=True):
            y, inner = _output(x, layer, z)
            outputs.append(y)
            kept += [z if _trains(layer.B, layer.g, layer.b) else None, inner]
        ctx.settings, ctx.shape = settings, x.shape
        ctx.save_for_backward(x if _trains(*(layer.A for layer in layers)) else None, *kept, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        n, wide = len(ctx.settings), len(TENSORS)
        x, *rest = ctx.saved_tensors
        kept, layers = rest[: 2 * n], _filled(ctx.settings, rest[2 * n :])
        needs_x, _, *needs = ctx.needs_input_grad
        dx: Tensor | None = None
        found, dzs = list[dict[str, Tensor]](), list[Tensor | None]()
        for i, (layer, dy) in enumerate(zip(layers, dys, strict=True)):
            dz = None
            found.append({})
            if dy is not None:
                z, inner = kept[2 * i : 2 * i + 2]
                dy, dz = _through(dy.reshape(-1, dy.shape[-1]), layer, z, inner, found[i])
                dx = _into(dx, dy, layer) if needs_x else None
            dzs.append(dz)
        if x is not None and dx is not None:
            layers = [_mask_made(layer, x) for layer in layers]
        if x is not None:
            for grads, dA in zip(found, _dA(x.reshape(-1, x.shape[-1]), layers, dzs), strict=True):
                grads["A"] = dA  # type: ignore[assignment]
        if dx is not None:
            dx = _add_down(dx, layers, dzs).view(ctx.shape)
        tensors = [grads.get(name) for grads in found for name in TENSORS]
        return dx, None, *(grad if need else None for grad, need in zip(tensors, needs[: n * wide], strict=True))


def _filled(settings: Sequence[Layer], tensors: Sequence[Tensor | None]) -> list[Layer]:
    n = len(TENSORS)
    return [layer._replace(**dict(zip(TENSORS, tensors[n * i : n * i + n], strict=True))) for i, layer in enumerate(settings)]  # type: ignore[arg-type]


def _together(layers: Sequence[Layer]) -> bool:
    """Whether their A can be one matrix: no mask of their own, and more than one of them."""
    return len(layers) > 1 and all(layer.mask is None for layer in layers)


def _kernels(like: Tensor) -> ModuleType:
    """The r-wide products on a tensor's device: ops/cpu.py, whose operations run anywhere, or ops/triton."""
    if not triton.available(like.device, like.dtype):
        return cpu
    from lorakit.ops.triton import products

    return products


def _mask_made(layer: Layer, x: Tensor) -> Layer:
    """The layer with its mask made once for both products that need it; a kernel makes it in registers."""
    if layer.mask is None or _kernels(x) is not cpu:
        return layer
    return layer._replace(mask=layer.mask.made_for(x.reshape(-1, x.shape[-1])))


def _trains(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _down(x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
    """Each layer's A x̃: [n, r]."""
    if _together(layers):
        stacked = torch.cat([layer.A.to(x.dtype) for layer in layers])
        return list(_kernels(x).down(x, stacked).split([len(layer.A) for layer in layers], 1))
    return [_kernels(x).down(x, layer.A.to(x.dtype), layer.mask) for layer in layers]


def _output(x: Tensor, layer: Layer, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the layer's output, and what of it γ's gradient needs)."""
    if _merges(layer, x.numel() // x.shape[-1] > layer.A.shape[1]):
        return F.linear(x, _merged(layer), layer.bias), None
    y = layer.frozen(x)
    shape, y = y.shape, y.reshape(-1, y.shape[-1])
    u, B = _scaled(z, layer), _up(layer, x.dtype)
    if layer.gain is None or not layer.gain.requires_grad:
        return _shaped(_kernels(y).finish_(y, u, B, gain=layer.gain, bias=layer.bias), shape), None
    inner = _kernels(y).finish_(y, u, B)
    return _shaped(_kernels(inner).gained(inner, layer.gain, layer.bias), shape), inner


def _shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """y in a shape, and no view of it: some models write into what a linear layer gave them."""
    return torch.ops.aten._unsafe_view(y, shape)  # type: ignore[no-any-return]


def _through(dy: Tensor, layer: Layer, z: Tensor | None, inner: Tensor | None, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of W x + … [n, d_out] and of A x̃ [n, r]; those of the layer's tensors but A are put in `found`."""
    if layer.bias is not None and _trains(layer.bias, layer.gain):
        found["bias"] = dy.sum(0, dtype=layer.bias.dtype)
    if layer.gain is not None:
        if inner is not None:
            shift = 0 if layer.bias is None else layer.bias * found["bias"]
            found["gain"] = _by_column(dy, inner, layer.gain.dtype) - shift
        dy = _kernels(dy).gained(dy, layer.gain)
    du = dy @ _up(layer, dy.dtype)
    if z is not None:
        if _trains(layer.B, layer.b):
            dB = (_scaled(z, layer).T @ dy).T  # this way round is the faster one
            if _trains(layer.B):
                found["B"] = dB if layer.b is None else dB * layer.b[:, None]
            if layer.b is not None:
                found["b"] = (dB * layer.B).sum(1, dtype=layer.b.dtype)
        if layer.g is not None:
            found["g"] = (du * z).sum(0, dtype=layer.g.dtype) * _scale(layer)
    return dy, _scaled(du, layer)


def _by_column(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_n x ∘ y in a wide dtype: [n, m] -> [m]. Some rows at a time: torch's own sum over rows of a narrow dtype is slow."""
    if x.device.type != "cpu":
        return (x * y).sum(0, dtype=dtype)
    sums = x.new_zeros(min(len(x), ROWS), x.shape[1], dtype=dtype)
    for a, b in zip(x.split(ROWS), y.split(ROWS), strict=True):
        sums[: len(a)].addcmul_(a.to(dtype), b.to(dtype))
    return sums.sum(0)


def _dA(x: Tensor, layers: Sequence[Layer], dzs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    if _together(layers) and all(dz is not None for dz in dzs):
        return list(_kernels(x).outer(torch.cat(dzs, 1), x).split([len(layer.A) for layer in layers]))  # type: ignore[arg-type]
    return [None if dz is None else _kernels(x).outer(dz, x, layer.mask) for layer, dz in zip(layers, dzs, strict=True)]


def _add_down(dx: Tensor, layers: Sequence[Layer], dzs: Sequence[Tensor | None]) -> Tensor:
    """dx with what the A add to it, in place: [n, d_in]."""
    pairs = [(layer, dz) for layer, dz in zip(layers, dzs, strict=True) if dz is not None and not _merges(layer, len(dz) > len(layer.B))]
    if _together([layer for layer, _ in pairs]):
        stacked = torch.cat([layer.A.to(dx.dtype) for layer, _ in pairs])
        _kernels(dx).finish_(dx, torch.cat([dz for _, dz in pairs], 1), stacked.T)
        return dx
    for layer, dz in pairs:
        _kernels(dx).finish_(dx, dz, layer.A.to(dx.dtype).T, mask=layer.mask)
    return dx


def _into(dx: Tensor | None, dy: Tensor, layer: Layer) -> Tensor:
    """dx with what the layer's W adds to it, and ΔW where the two are one."""
    if not _merges(layer, len(dy) > len(layer.B)):
        return layer.matmul_t(dy, dx)
    return dy @ _merged(layer) if dx is None else dx.addmm_(dy, _merged(layer))


def _merges(layer: Layer, many: bool) -> bool:
    """Whether W + ΔW is multiplied at once; `many`: that there are tokens enough for it."""
    return many and layer.dense is not None and layer.mask is None and layer.gain is None


def _merged(layer: Layer) -> Tensor:
    """W + ΔW: [d_out, d_in]."""
    assert layer.dense is not None
    W = layer.dense()
    A = layer.A if layer.g is None else layer.g[:, None] * layer.A
    return torch.addmm(W, _up(layer, W.dtype), A, alpha=layer.s)


def _scale(layer: Layer) -> float:
    """s / (1 − p)."""
    return layer.s if layer.mask is None else layer.s * layer.mask.scale


def _scaled(z: Tensor, layer: Layer) -> Tensor:
    """s g ∘ z / (1 − p)."""
    return z * _scale(layer) if layer.g is None else z * (layer.g * _scale(layer)).to(z.dtype)


def _up(layer: Layer, dtype: torch.dtype) -> Tensor:
    """diag(b) B in the compute dtype."""
    return (layer.B if layer.b is None else layer.b[:, None] * layer.B).to(dtype)
