"""Shifted sparse attention (S²): in training each token attends within its group; half of the heads have groups shifted by half a group.

    group of place i: ⌊i / g⌋ for the first heads, ⌊(i + g − o) / g⌋ for the shifted ones, o = ⌊g / 2⌋
    scores a head computes: Σ over groups of size², at most T · g instead of T²

The shifted heads' first group is short (o places): nothing is rolled around the end, so no token sees a later one. The model's own mask
(causal, padding, packed documents, windows) holds inside the groups. In eval mode, and wherever queries are not the keys' own places,
attention is the model's, bit for bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.context import Cell
from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.site import MIXTURES, Kind, Site
from lorakit.parts.patches import masks
from lorakit.parts.patches.attention import AttentionPatch, Call, Onward, Out, attention_paths


def pieces(t: int, g: int, o: int) -> Iterator[tuple[int, int, int]]:
    """(start, size, how many in a row) of the groups of t places: o places, then groups of g, then the rest."""
    o = min(o, t)
    whole, rest = divmod(t - o, g)
    for start, size, count in ((0, o, 1), (o, g, whole), (t - rest, rest, 1)):
        if size * count:
            yield start, size, count


def fold(x: Tensor, start: int, size: int, count: int) -> Tensor:
    """[b, h, t, d] -> [b · count, h, size, d]: some groups in the place of the batch."""
    b, h, _, d = x.shape
    return x[:, :, start : start + size * count].reshape(b, h, count, size, d).transpose(1, 2).reshape(b * count, h, size, d)


def fold_mask(mask: Tensor, b: int, start: int, size: int, count: int) -> Tensor:
    """[b or 1, h or 1, t, t] -> [b · count, h or 1, size, size]: the blocks on the diagonal."""
    end = start + size * count
    square = mask[:, :, start:end, start:end]
    blocks: Tensor = square.unflatten(3, (count, size)).unflatten(2, (count, size)).diagonal(dim1=2, dim2=4)
    return blocks.permute(0, 4, 1, 2, 3).expand(b, -1, -1, -1, -1).flatten(0, 1)


def grouped(call: Call, g: int, o: int, onward: Onward) -> Tensor:
    """The attention [b, t, h, d] of a call within groups."""
    b, _, t, _ = call.query.shape
    outs = []
    for start, size, count in pieces(t, g, o):
        q, k, v = (fold(x, start, size, count) for x in (call.query, call.key, call.value))
        mask = None if call.mask is None else fold_mask(call.mask, b, start, size, count)
        out, _ = onward(replace(call, query=q, key=k, value=v, mask=mask, causal=call.causal and size > 1))
        outs.append(out.unflatten(0, (b, count)).flatten(1, 2))
    return torch.cat(outs, dim=1)


def pattern(t: int, g: int, heads: int, device: torch.device) -> Tensor:
    """What `grouped` lets each head see, causality aside: [1, heads, t, t]; the first ⌊heads / 2⌋ are not shifted."""
    place = torch.arange(t, device=device)
    group = torch.stack([place // g, (place + g - g // 2) // g])[(torch.arange(heads, device=device) >= heads // 2).long()]
    return (group[:, :, None] == group[:, None, :])[None]


def wrapped(t: int, g: int, heads: int, device: torch.device) -> Tensor:
    """What the released code's eager path lets each head see: the shifted heads' places are rolled by g / 2, and causality is judged after
    the roll. So its last group joins the end of the text to the beginning, and early tokens see late ones."""
    if t % g or g % 2:
        raise BadParameter(f"wrap=True needs a text that is a multiple of an even group; found {t} tokens in groups of {g}")
    place = torch.arange(t, device=device)
    rolled = torch.stack([place, (place - g // 2) % t])[(torch.arange(heads, device=device) >= heads // 2).long()]
    same = (rolled // g)[:, :, None] == (rolled // g)[:, None, :]
    return (same & (rolled[:, None, :] <= rolled[:, :, None]))[None]


class Shifted(AttentionPatch):
    """The patch; it owns nothing."""

    def __init__(self, model: nn.Module, cell: Cell, spec: "ShiftedSpec") -> None:
        super().__init__(model, attention_paths(model), cell)
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            raise Incompatible("shifted groups are of one text attending to itself; an encoder-decoder attends to another one, too")
        self.spec = spec

    def acts(self, call: Call) -> bool:
        return call.module.training and call.query.shape[2] == call.key.shape[2]

    def attend(self, call: Call, onward: Onward, at: int) -> Out:
        t, heads = call.query.shape[2], call.query.shape[1]
        g = self.spec.size(t)
        if self.spec.wrap:
            seen = wrapped(t, g, heads, call.query.device)
            if (
                explicit := call.explicit()
            ) is not None:  # its causality is not this one's; its padding is: no real key is hidden from itself
                seen = seen & masks.visible(explicit).diagonal(dim1=2, dim2=3)[:, :, None]
            return onward(call.masked(seen))
        if not splits(call):
            return onward(call.masked(masks.restricted(call.explicit(), pattern(t, g, heads, call.query.device))))
        halves = [_heads(call, heads // 2, first) for first in (True, False)]
        return torch.cat([grouped(half, g, o, onward) for half, o in zip(halves, (0, g // 2), strict=True)], dim=2), None


def splits(call: Call) -> bool:
    """Whether both halves have key-value heads of their own and nothing else in the call belongs to single heads."""
    heads, kv = call.query.shape[1], call.key.shape[1]
    per_head = [call.options.get(k) for k in ("position_bias", "s_aux")] + [call.module._parameters.get("sinks")]
    return heads % 2 == 0 and kv % 2 == 0 and all(x is None for x in per_head) and (call.mask is None or call.mask.shape[1] == 1)


def _heads(call: Call, half: int, first: bool) -> Call:
    """The call of the first or the second half of the heads."""
    kv = call.key.shape[1] // 2
    q, k, v = (x[:, :n] if first else x[:, n:] for x, n in ((call.query, half), (call.key, kv), (call.value, kv)))
    return replace(call, query=q, key=k, value=v)


@dataclass(frozen=True)
class ShiftedSpec:
    """Groups of `group` tokens, or (0) of a quarter of the text. `wrap`: the released code's eager path, which leaks."""

    kinds: ClassVar[frozenset[Kind]] = MIXTURES
    group: int = 0
    wrap: bool = False
    name: str = "shifted"
    requires: frozenset[str] = frozenset()
    kept: str | None = None

    def __post_init__(self) -> None:
        if self.group < 0 or self.group == 1:
            raise BadParameter(f"group={self.group} is not possible: a group has at least 2 tokens; 0 stands for a quarter of the text")

    def size(self, t: int) -> int:
        """Tokens in a group of a text of t."""
        return self.group or max(2, -(-t // 4))

    def build(
        self, model: nn.Module, sites: Sequence[Site], *, cell: Cell, rng: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> Shifted:
        return Shifted(model, cell, self)

    def count(self, model: nn.Module) -> int:
        return 0
