"""Patches that change what a layer's attention computes, in Transformers' attention interface.

    out = softmax(scaling · q kᵀ + mask) v          q [b, h, t, d]; k, v [b, h_kv, s, d]; out [b, t, h, d]

An attention module asks its own `config` which function computes this. While a patch is in force the module has a copy of its config that
names `attend` below; the model's config, from which the masks are made, stays as it was, and so do the masks. `attend` hands the call
through the module's patches to the function that it would have called. So the patches of several adapters add up, grouped-query heads,
caches and padding need no code here, and nothing of Transformers is overwritten. sdpa and eager are supported: the others get no explicit
mask.
"""

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lorakit.core.context import Cell
from lorakit.core.errors import Incompatible
from lorakit.core.generated import plain_type
from lorakit.core.shared import Patch
from lorakit.core.site import Site, sites_of
from lorakit.parts.patches import masks

NAME = "lorakit"
SUPPORTED = ("sdpa", "eager")
Out = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Call:
    """One call of an attention function. `causal`: there is no mask, and query i sees the keys up to i."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    options: dict[str, Any]
    """What else the module passed: scaling, dropout, a position bias, …"""

    def explicit(self) -> Tensor | None:
        """The mask, made where it is only implied. None: every query sees every key."""
        if not self.causal:
            return self.mask
        return masks.causal(self.query.shape[2], self.key.shape[2], self.query.device)

    def masked(self, mask: Tensor | None) -> "Call":
        """The same call under another mask."""
        return replace(self, mask=mask, causal=False)


Onward = Callable[[Call], Out]


class AttentionPatch(Patch):
    """A patch of some attention modules; `attend` is called in place of each one's attention function."""

    def __init__(self, model: nn.Module, paths: Sequence[str], cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.paths, self.modules_of = tuple(paths), (model,)  # in a tuple: not a child

    def acts(self, call: Call) -> bool:
        """Whether there is anything to do; if not, the call goes on untouched, bit for bit."""
        return True

    @abstractmethod
    def attend(self, call: Call, onward: Onward, at: int) -> Out:
        """The attention of the module at `paths[at]`; `onward` computes a call's attention."""

    def install(self) -> None:
        modules = [self.modules_of[0].get_submodule(path) for path in self.paths]
        for module, path in zip(modules, self.paths, strict=True):
            check(module, path)
        for at, module in enumerate(modules):
            around = module.__dict__.get("lora_attention") or _divert(module)
            around.patches.append((self, at))

    def remove(self) -> None:
        for path in self.paths:
            module = self.modules_of[0].get_submodule(path)
            around: Around = module.__dict__["lora_attention"]
            around.patches = [(patch, at) for patch, at in around.patches if patch is not self]
            if not around.patches:
                module.config = around.config
                del module.__dict__["lora_attention"]


@dataclass
class Around:
    """What a diverted attention module carries: its own config, and the patches in force."""

    config: Any
    patches: list[tuple[AttentionPatch, int]]

    def __post_init__(self) -> None:
        _interface().register(NAME, attend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a pickled model may be opened where nothing was attached yet


def attention_paths(model: nn.Module) -> list[str]:
    """The attention modules of a model, in order: whatever holds a query, key or value projection."""
    paths = dict.fromkeys(s.module.rpartition(".")[0] for s in sites_of(model) if s.role in ("q", "k", "v", "qkv"))
    if not paths:
        raise Incompatible("this model has no attention module that lorakit knows: none of its modules holds q, k and v projections")
    return list(paths)


def projections(model: nn.Module, path: str) -> dict[str, Site]:
    """{role: site} of the query, key and value projections of one attention module; parts of a fused one count."""
    return {s.role: s for s in sites_of(model) if s.module.rpartition(".")[0] == path and s.role in ("q", "k", "v")}


def check(module: nn.Module, path: str) -> None:
    """Raise Incompatible unless the module's attention goes through the interface in a supported form."""
    config = getattr(module, "config", None)
    file = sys.modules[plain_type(module).__module__]
    if config is None or not isinstance(getattr(file, "ALL_ATTENTION_FUNCTIONS", None), _interface()):
        raise Incompatible(f"{path} ({type(module).__name__}) does not use Transformers' attention interface, which this method changes")
    found = config._attn_implementation
    if found not in (*SUPPORTED, NAME):
        raise Incompatible(
            f"{path} computes attention by {found!r}, which takes no explicit mask; this method needs one of {SUPPORTED}: "
            f"load the model with attn_implementation={SUPPORTED[0]!r}"
        )
    if found == "eager" and getattr(config, "reorder_and_upcast_attn", False):
        raise Incompatible(f"{path} upcasts its attention (reorder_and_upcast_attn), which bypasses the interface that this method changes")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    **options: Any,
) -> Out:
    """The attention function that a diverted module finds in the interface."""
    around: Around = module.__dict__["lora_attention"]
    eager = around.config._attn_implementation == "eager"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and not eager and attention_mask is None and query.shape[2] > 1  # eager knows masks only
    call = Call(module, query, key, value, attention_mask, causal, options)
    return _through([(patch, at) for patch, at in around.patches if patch.acts(call)], call)


def _through(patches: list[tuple[AttentionPatch, int]], call: Call) -> Out:
    if not patches:
        return plain(call)
    (patch, at), rest = patches[-1], patches[:-1]
    return patch.attend(call, lambda changed: _through(rest, changed), at)


def plain(call: Call) -> Out:
    """What the module itself would have computed."""
    config = call.module.__dict__["lora_attention"].config
    file = sys.modules[plain_type(call.module).__module__]
    found = config._attn_implementation
    function = file.ALL_ATTENTION_FUNCTIONS.get_interface(found, file.eager_attention_forward)
    mask = masks.additive(call.mask, call.query.dtype) if found == "eager" else call.mask
    return function(call.module, call.query, call.key, call.value, mask, is_causal=call.causal, **call.options)  # type: ignore[no-any-return]


def _divert(module: nn.Module) -> Around:
    around = Around(module.config, [])
    own: Any = copy.copy(module.config)
    own._attn_implementation_internal = NAME  # the property's setter would reach the configs inside, which are shared
    module.config = own
    module.__dict__["lora_attention"] = around
    return around


def _interface() -> Any:
    from transformers.modeling_utils import AttentionInterface  # the registry of methods is read without Transformers

    return AttentionInterface
