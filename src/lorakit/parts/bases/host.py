"""The module that holds a packed weight: nn.Linear or Conv1D of a generated class, whose `weight` is the codes.

Everything that looks at a module goes on working: names, isinstance, deepcopy, pickle, `.to()`. The scales are buffers of integers (fp32
ones by their bits), so that casting the model rounds none of them. A state dict holds bitsandbytes' entries, or the original weight as long
as the module keeps it; either kind can be loaded. While the weight is dense, as after a merge, the module does what it did before.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.base import Transposed, base_of
from lorakit.core.errors import CheckpointError
from lorakit.core.fingerprint import sample
from lorakit.core.generated import generate
from lorakit.parts.bases import bnb
from lorakit.parts.bases.matmul import nf4_dense, nf4_matmul
from lorakit.parts.bases.packed import Layout, Packed


@dataclass
class Held:
    """What such a module knows besides its tensors: how W is cut, whether the host stores Wᵀ, the weight that was packed (None: dropped),
    its sample for fingerprints, and the dtype that W has when it is dense, which follows casts of the module."""

    layout: Layout
    transposed: bool
    original: nn.Parameter | None
    origin: Tensor | None
    dtype: torch.dtype


def enter(module: nn.Module, layout: Layout, storage: type, *, keep: bool) -> None:
    """Pack the module's weight. `keep`: the original stays in the module for `leave`. `storage`: the Base of such a module."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    base = base_of(module)
    packed, origin = Packed.of(base.dense(), layout), None if weight.is_meta else sample(weight)
    module.__dict__["nf4"] = Held(layout, isinstance(base, Transposed), weight if keep else None, origin, weight.dtype)
    put(module, packed)
    module.__class__ = packed_class(type(module), storage)  # type: ignore[arg-type]  # mypy finds no __hash__ on type[Module]


def held(module: nn.Module) -> Held:
    """What a module that was entered knows."""
    return module.nf4  # type: ignore[return-value]


def leave(module: nn.Module) -> None:
    """Undo `enter`. A weight that is dense stays; else the original, which must have been kept, comes back."""
    if (packed := packed_in(module)) is not None:
        original = held(module).original
        assert original is not None
        original.data = original.data.to(packed.codes.device)
        module.register_parameter("weight", original)
    for name in ("nf4", "scales", "nested"):
        delattr(module, name)
    module.__class__ = type(module).unpacked  # type: ignore[attr-defined]


def put(module: nn.Module, packed: Packed) -> None:
    """Set the codes and scales."""
    module.register_parameter("weight", nn.Parameter(packed.codes, requires_grad=False))
    module.register_buffer("scales", _bits(packed.scales), persistent=False)
    module.register_buffer("nested", None if packed.nested is None else _bits(packed.nested), persistent=False)


def packed_in(module: nn.Module) -> Packed | None:
    """The codes and scales; None while the weight is dense."""
    weight, scales, nested = module.weight, module.scales, module.nested
    if weight.is_floating_point():  # type: ignore[operator]
        return None
    return Packed(weight, _floats(scales), None if nested is None else _floats(nested))  # type: ignore[arg-type]


def product(module: nn.Module, packed: Packed, x: Tensor, *, transposed: bool = False) -> Tensor:
    """x Wᵀ, or x W; under autocast in its dtype, as torch's own."""
    at = held(module).layout
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return nf4_matmul(x, *packed, at.d_out, at.d_in, at.dtype, at.blocksize, transposed)  # type: ignore[no-any-return]


def decoded(module: nn.Module, packed: Packed) -> Tensor:
    """W, d_out × d_in, in the dtype that it had."""
    at = held(module).layout
    return nf4_dense(*packed, at.d_out, at.d_in, at.dtype, at.blocksize)  # type: ignore[no-any-return]


@functools.cache
def packed_class(plain: type[nn.Module], storage: type) -> type[nn.Module]:
    """The generated subclass of one module class."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        packed = packed_in(self)
        if packed is None:
            return plain.forward(self, x)  # type: ignore[no-any-return]
        y = product(self, packed, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # type: ignore[operator]

    def save(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        plain._save_to_state_dict(self, destination, prefix, keep_vars)
        destination |= {prefix + k: v for k, v in entries(self, keep_vars).items()}

    def load(self: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        plain._load_from_state_dict(self, _loaded(self, state, prefix), prefix, *rest)

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        held(self).dtype = fn(torch.empty(0, dtype=held(self).dtype)).dtype
        return plain._apply(self, fn, recurse)  # type: ignore[no-any-return]

    body: dict[str, Any] = {"_apply": apply, "_save_to_state_dict": save, "_load_from_state_dict": load}
    body |= {"storage": storage, "unpacked": plain, "origin": staticmethod(origin)}
    return generate("Packed", packed_class, plain, storage, forward=forward, **body)


def origin(module: nn.Module) -> tuple[tuple[int, ...], Tensor | None]:
    """Shape and sample of the weight as it was before it was packed, for fingerprints."""
    at = held(module).layout
    return (at.d_in, at.d_out) if held(module).transposed else (at.d_out, at.d_in), held(module).origin


def entries(module: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """What a state dict holds for the weight, beside what a plain module's does."""
    original, packed = held(module).original, packed_in(module)
    if packed is None:
        return {}
    if original is not None:
        return {"weight": original if keep_vars else original.detach()}
    return {k: v for k, v in bnb.write(packed, held(module).layout).items() if k != "weight"}


def _loaded(module: nn.Module, state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A state dict as a plain module of this weight's present form would have it; the scales are set."""
    found = {k: v for k, v in state.items() if k.startswith(prefix + "weight")}
    rest = {k: v for k, v in state.items() if k not in found}
    here = packed_in(module)
    if prefix + "weight" not in found or here is None:
        return state
    known, given = held(module), found[prefix + "weight"]
    packed = _read({k.removeprefix(prefix): v for k, v in found.items()}, known, prefix + "weight")
    put(module, Packed(*(None if t is None else t.to(here.codes.device) for t in packed)))  # type: ignore[arg-type]
    plain = given.is_floating_point() and len(found) == 1
    known.origin = sample(given) if plain else None
    if known.original is not None:  # the base is another one now, also when it is given back
        W = decoded(module, packed)
        known.original.data.copy_(given if plain else W.T if known.transposed else W)
    return rest | {prefix + "weight": module.weight}


def _read(found: dict[str, Tensor], known: Held, name: str) -> Packed:
    layout, weight = known.layout, found["weight"]
    if len(found) == 1 and weight.is_floating_point():
        W = weight.T if known.transposed else weight
        if tuple(W.shape) != (layout.d_out, layout.d_in):
            raise CheckpointError(f"{name} is {tuple(W.shape)}; this module's weight is {layout.d_out} × {layout.d_in}")
        return Packed.of(W, layout)
    packed, other = bnb.read(found, name)
    if other != layout:
        raise CheckpointError(f"{name} was packed as {other}; this module's is {layout}")
    return packed


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.int32) if t.is_floating_point() else t


def _floats(t: Tensor) -> Tensor:
    return t.view(torch.float32) if t.dtype == torch.int32 else t
