"""Trained keys and values in front of every attention module's own (prefix tuning, layer form).

    attention(q, [K_l; k], [V_l; v])        K_l, V_l [n, d_k], [n, d_v]: l runs over the attention modules, an encoder-decoder's
                                            cross-attentions included; every query sees all n of them, in a packed window too

The tokens' positions stay as they are. Where positions rotate keys (RoPE) that loses nothing: a prefix at positions −n … −1 is one with
other trained numbers in K. Keys that the cache holds are the tokens' own, so decoding needs no care.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.context import Cell
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.site import MIXTURES, Kind, Site
from lorakit.parts.patches import masks
from lorakit.parts.patches.attention import AttentionPatch, Call, Onward, Out, attention_paths, projections
from lorakit.parts.patches.prompt import Start


class Prefix(AttentionPatch):
    """K [layers, n, d_k] and V [layers, n, d_v]."""

    trains = frozenset({"K", "V"})

    def __init__(self, model: nn.Module, cell: Cell, n: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(model, attention_paths(model), cell)
        d_k, d_v = _widths(model, self.paths)
        self.K = nn.Parameter(torch.zeros(len(self.paths), n, d_k, dtype=dtype, device=device))
        self.V = nn.Parameter(torch.zeros(len(self.paths), n, d_v, dtype=dtype, device=device))

    def attend(self, call: Call, onward: Onward, at: int) -> Out:
        if call.options.get("cache") is not None:
            raise Incompatible("a paged cache holds keys that a prefix would have to precede: generate without continuous batching")
        n = self.K.shape[1]
        key, value = _joined(self.K[at], call.key), _joined(self.V[at], call.value)
        longer = replace(call.masked(masks.lengthened(call.explicit(), n)), key=key, value=value)
        bias = call.options.get("position_bias")
        return onward(longer if bias is None else replace(longer, options=call.options | {"position_bias": masks.lengthened(bias, n)}))


def _joined(own: Tensor, given: Tensor) -> Tensor:
    """own [n, h · d] in front of given [b, h, s, d]."""
    b, h, _, d = given.shape
    return torch.cat([own.to(given.dtype).view(-1, h, d).transpose(0, 1).expand(b, -1, -1, -1), given], dim=2)


def _widths(model: nn.Module, paths: Sequence[str]) -> tuple[int, int]:
    found = {(sites["k"].d_out, sites["v"].d_out) for path in paths if (sites := projections(model, path)).keys() >= {"k", "v"}}
    if len(found) != 1:
        raise Incompatible(f"a prefix needs key and value projections of one width in all layers; found {sorted(found) or 'none apart'}")
    return found.pop()


class _Recorder(AttentionPatch):
    """Keeps the keys and values of one forward: [s, width] a module."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__(model, paths, Cell())
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, call: Call, onward: Onward, at: int) -> Out:
        self.seen[at] = tuple(x[0].transpose(0, 1).flatten(1) for x in (call.key, call.value))  # type: ignore[assignment]
        return onward(call)


@torch.no_grad()
def recorded(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The (keys, values), [n, width] each, that the tokens `ids` [n] have in each attention module of the model in eval mode."""
    recorder, modes = _Recorder(model, attention_paths(model)), {module: module.training for module in model.modules()}
    recorder.install()
    try:
        both = {"decoder_input_ids": ids[None]} if getattr(model.config, "is_encoder_decoder", False) else {}
        model.eval()(input_ids=ids[None], use_cache=False, **both)
    finally:
        recorder.remove()
        for module, training in modes.items():
            module.training = training
    return [recorder.seen[at] for at in range(len(recorder.paths))]


@dataclass(frozen=True)
class PrefixSpec:
    """n trained positions a layer, started from those of n random words of the vocabulary or from N(0, std²)."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    n: int
    start: Start = "words"
    std: float = 0.02
    name: str = "prefix"
    requires: frozenset[str] = frozenset()
    kept: str = "its trained keys and values stay beside the weights"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise BadParameter(f"n={self.n} is not possible: a prefix has at least one position")

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Prefix:
        prefix = Prefix(model, cell, self.n, dtype=dtype, device=device)
        with torch.no_grad():
            if self.start == "words":
                vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
                words = recorded(model, torch.randint(vocabulary, (self.n,), generator=rng).to(device))
                prefix.K.copy_(torch.stack([k for k, _ in words]))
                prefix.V.copy_(torch.stack([v for _, v in words]))
            else:
                for p in (prefix.K, prefix.V):
                    p.copy_(torch.empty(p.shape, dtype=torch.float64).normal_(0, self.std, generator=rng))
        return prefix

    def count(self, model: nn.Module) -> int:
        paths = attention_paths(model)
        return self.n * len(paths) * sum(_widths(model, paths))
