"""PEFT's pairs of stacked weights (`target_parameters`): two matrices for all experts of a layer, in one of two layouts.

    since 0.19    A [E·r, d_in] expert by expert,  B [d_out, r·E] rank by rank, the experts innermost      ΔW_e = s · B[:, :, e] A[e]
    before        of a weight stored [E, d_out, d_in] PEFT took d_out for d_in: A [E·r, d_out], B [d_in, r·E], ΔW_e = s · (B[:, :, e] A[e])ᵀ

Weights stored [E, d_in, d_out] (gpt-oss) have always had the first. The shapes tell which it is; where d_out = d_in at every weight of a
file they do not, and then the version of PEFT that wrote it does.

PEFT wraps a module once for each of its adapted weights, the last declared outermost, so that a key tells a wrapper's depth:
`experts.base_layer.lora_A.weight` belongs to gate_up_proj and `experts.lora_A.weight` to down_proj when both are adapted.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lorakit.core.errors import AdapterMismatch, CheckpointError
from lorakit.core.site import Site

WRAPPED = ".base_layer"
SINCE = (0, 19)
BEFORE = "0.18.1"
"""A version that wrote the layout before."""

Matrices = tuple[Tensor, Tensor]
"""lora_A and lora_B as they are in the file."""


def pack(A: Tensor, B: Tensor, *, flipped: bool) -> Matrices:
    """PEFT's matrices of A [E, r, d_in] and B [E, d_out, r]."""
    first, second = (B.mT, A.mT) if flipped else (A, B)
    return first.flatten(0, 1).contiguous(), second.permute(1, 2, 0).flatten(1, 2).contiguous()


def unpack(first: Tensor, second: Tensor, experts: int, *, flipped: bool) -> Matrices:
    """A [E, r, d_in] and B [E, d_out, r] of PEFT's matrices."""
    A, B = first.unflatten(0, (experts, -1)), second.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return (B.mT.contiguous(), A.mT.contiguous()) if flipped else (A.contiguous(), B.contiguous())


def holder(site: Site, adapted: Sequence[Site]) -> str:
    """The path of the wrapper that holds a stacked weight's pair, beside these other adapted weights in the order of declaration."""
    inside = [other.name for other in adapted if other.module == site.module]
    return site.module + WRAPPED * (len(inside) - 1 - inside.index(site.name))


def is_old(found: Mapping[Site, Matrices], version: str | None, path: Path) -> bool:
    """Whether a file's pairs are in the layout before 0.19. Raises AdapterMismatch for shapes of neither, CheckpointError when nothing tells."""
    for site, matrices in found.items():
        if not any(_fits(site, matrices, old) for old in (False, True)):
            shapes = " and ".join(str(tuple(m.shape)) for m in matrices)
            raise AdapterMismatch(
                f"the matrices of {site.name!r} are {shapes}; its {site.experts} experts of {site.d_out} × {site.d_in} need "
                f"({site.experts}·r, {site.d_in}) and ({site.d_out}, {site.experts}·r)"
            )
    layouts = [old for old in (False, True) if all(_fits(site, matrices, old) for site, matrices in found.items())]
    if len(layouts) == 1:
        return layouts[0]
    release = re.match(r"(\d+)\.(\d+)", version or "")
    if not layouts or release is None:
        raise CheckpointError(
            f"{path}: the shapes of {next(iter(found)).name!r} and its like do not say whether PEFT wrote them before version 0.19, which "
            'turned them over, or since; add "peft_version" to the file, for example "0.18.1"'
        )
    return (int(release[1]), int(release[2])) < SINCE


def _fits(site: Site, matrices: Matrices, old: bool) -> bool:
    first, second = matrices
    inner, outer = (site.d_out, site.d_in) if old else (site.d_in, site.d_out)
    ranks = first.shape[0]
    return bool(site.experts) and first.shape == (ranks, inner) and second.shape == (outer, ranks) and ranks % (site.experts or 1) == 0
