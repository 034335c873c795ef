"""HiddenKey: dropout where LoRA overfits: keys in attention, the hidden units of the MLP, and two passes that must agree.

    scores[b, h, :, j] = −∞ with probability `keys`, for all queries of a head at once        (column-wise DropKey, before the softmax)
    h ← h ∘ m / (1 − `hidden`), m ~ Bernoulli(1 − `hidden`) element by element                 (HiddenCut, what enters the down projection)
    L = ½ (CE₁ + CE₂) + `kl` · ½ [KL(p₁‖p₂) + KL(p₂‖p₁)]                                       (two forwards under different masks)

Attention is renormalized by its softmax over the keys that are left: weights still sum to one. A query that would lose every key keeps
them all (the first tokens of a causal text see few). Masks follow from (seed, step, site). In eval mode the model is plain LoRA. `kl=0` is
the paper's HiddenKey without the KL term: one forward, half the cost.
Trained: A and B, as in `lora`. Checkpoint: plain LoRA. Needs attention by sdpa or eager.
Defaults: `keys` and `hidden` 0.1, `kl` 1: our reading, the paper tunes all three for each task (rates from 0.01 to 0.2). That a key is
dropped for one head, not for all, and that terms are weighted so, is our reading, too; no public reference implementation was found.
References: arXiv:2403.00812; survey 3.3.3.

Use it when a LoRA overfits small data and you can pay for two forwards a step (`kl=0`: one). With enough data dropout only slows it;
attention by flash kernels, which cannot drop keys, is not available.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import random
from lorakit.core.context import Cell
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.method import Method, get_method, method
from lorakit.core.shared import Patch
from lorakit.core.site import MIXTURES, MODULES, Kind, Site, Where, sites_of
from lorakit.parts.objectives.agreement import Agreement
from lorakit.parts.patches import masks
from lorakit.parts.patches.attention import AttentionPatch, Call, Onward, Out, attention_paths


def without(mask: Tensor | None, keep: Tensor) -> Tensor:
    """The attention mask with the keys outside `keep` (bool [b, h, 1, s]) hidden; a query left without any keeps those of `mask`."""
    seen = torch.ones_like(keep) if mask is None else masks.visible(mask)
    left = seen & keep
    return masks.restricted(mask, torch.where(left.any(-1, keepdim=True), left, seen))


class DropKeys(AttentionPatch):
    """Hides whole keys in training."""

    draws = True

    def __init__(self, model: nn.Module, cell: Cell, p: float) -> None:
        super().__init__(model, attention_paths(model), cell)
        self.p, self.streams = p, [random.stream(f"{path}.keys") for path in self.paths]

    def acts(self, call: Call) -> bool:
        return call.module.training

    def attend(self, call: Call, onward: Onward, at: int) -> Out:
        b, h, s = call.query.shape[0], call.query.shape[1], call.key.shape[2]
        drawn = random.dropout_mask(call.query.new_empty(b, h, 1, s), self.cell.value.key, self.streams[at], self.p)
        return onward(call.masked(without(call.explicit(), drawn > 0)))


class CutHidden(Patch):
    """Drops entries of what enters the down projections, in training."""

    draws = True

    def __init__(self, model: nn.Module, cell: Cell, p: float) -> None:
        super().__init__()
        self.p, self.cell, self.model_of, self.handles = p, cell, (model,), list[Any]()  # in a tuple: not a child
        self.paths = [s.module for s in sites_of(model) if s.role == "down" and s.kind == "linear"]
        if not self.paths:
            raise Incompatible("this model has no MLP down projection that lorakit knows; use hidden=0")

    def install(self) -> None:
        for path in self.paths:
            cut = _Cut(self, random.stream(f"{path}.hidden"))
            self.handles.append(self.model_of[0].get_submodule(path).register_forward_pre_hook(cut))

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()


class _Cut:
    def __init__(self, patch: CutHidden, stream: Tensor) -> None:
        self.patch, self.stream = patch, stream

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not module.training:
            return None
        return random.dropout(args[0], self.patch.cell.value.key, self.stream, self.patch.p), *args[1:]


@dataclass(frozen=True)
class DropSpec:
    """Builds one of the two, by its class."""

    kind: type[DropKeys] | type[CutHidden]
    p: float
    requires: frozenset[str] = frozenset()
    kept: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise BadParameter(f"{self.name}: a rate of {self.p} is not a probability; expected 0 <= rate < 1")

    @property
    def kinds(self) -> frozenset[Kind]:
        return MIXTURES if self.kind is DropKeys else MODULES

    @property
    def name(self) -> str:
        return {DropKeys: "dropped_keys", CutHidden: "cut_hidden"}[self.kind]

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> DropKeys | CutHidden:
        return self.kind(model, cell, self.p)

    def count(self, model: nn.Module) -> int:
        return 0


@method("hiddenkey", paper="arXiv:2403.00812", survey="3.3.3", kind="patch + objective")
def hiddenkey(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    keys: float = 0.1,
    hidden: float = 0.1,
    kl: float = 1.0,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA with dropped attention keys, dropped MLP units, and two passes that must agree."""
    patches = tuple(spec for spec in (DropSpec(DropKeys, keys), DropSpec(CutHidden, hidden)) if spec.p > 0)
    lora = get_method("lora", r=r, alpha=alpha, dropout=dropout, sites=sites, unfreeze=unfreeze)
    return lora.but(patches=patches, objective=Agreement(kl) if kl else None)
