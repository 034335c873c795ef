"""PEFT's pairs of parameters (`target_parameters`): a router's, and those of stacked weights, which are two matrices for all experts of a
layer, in one of two layouts.

    since 0.19    A [E·r, d_in] expert by expert,  B [d_out, r·E] rank by rank, the experts innermost      ΔW_e = s · B[:, :, e] A[e]
    before        of a weight stored [E, d_out, d_in] PEFT took d_out for d_in: A [E·r, d_out], B [d_in, r·E], ΔW_e = s · (B[:, :, e] A[e])ᵀ

Weights stored [E, d_in, d_out] (gpt-oss) have always had the first. The shapes tell which it is; where d_out = d_in at every weight of a
file they do not, and then the version of PEFT that wrote it does.

PEFT wraps a module once for each of its adapted parameters, the last declared outermost, so that a key tells a wrapper's depth:
`experts.base_layer.lora_A.weight` belongs to gate_up_proj and `experts.lora_A.weight` to down_proj when both are adapted.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.peft_fields import VERSION
from lorakit.adapters.peft_names import PREFIX, matches_entry, shortest
from lorakit.core.errors import AdapterMismatch, CheckpointError, NotExportable
from lorakit.core.site import MODULES, Site, ours, sites_of

WRAPPED = ".base_layer"
ENDS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
SINCE = (0, 19)
BEFORE = "0.18.1"
"""A version that wrote the layout before."""

TAKEN: Mapping[str, Collection[str]] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), ("gate", "w1", "w2", "w3")),
    **dict.fromkeys(
        (
            "Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
            "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
            "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
            "qwen3_omni_moe_thinker", "solar_open",
        ),
        ("gate", "gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip
"""By model type: names of modules that PEFT takes for the router and the experts, which were such modules in Transformers 4, whatever else
has such a name now."""

Matrices = tuple[Tensor, Tensor]
"""lora_A and lora_B as they are in the file."""
Targets = Mapping[Site, bool]
"""Weights that PEFT adapts as parameters, whole and in the order of declaration, and whether each is a stack stored [E, d_in, d_out]."""


def targets_of(model: nn.Module | None, sites: Sequence[Site]) -> Targets:
    """Those of the model; without a model those among an adapter's sites."""
    if model is None:
        return {site: False for site in sites if site.kind not in MODULES}
    whole = [site for site in sites_of(model) if site.kind not in MODULES and site.rows is None]
    return {site: bool(site.experts and model.get_submodule(site.module).is_transposed) for site in whole}


# --------------------------------------------------------------------------------------------------------------------- the matrices
def pack(A: Tensor, B: Tensor, *, turned: bool) -> Matrices:
    """PEFT's matrices of A [E, r, d_in] and B [E, d_out, r]."""
    first, second = (B.mT, A.mT) if turned else (A, B)
    return first.flatten(0, 1).contiguous(), second.permute(1, 2, 0).flatten(1, 2).contiguous()


def unpack(first: Tensor, second: Tensor, experts: int, *, turned: bool) -> Matrices:
    """A [E, r, d_in] and B [E, d_out, r] of PEFT's matrices."""
    A, B = first.unflatten(0, (experts, -1)), second.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return (B.mT.contiguous(), A.mT.contiguous()) if turned else (A.contiguous(), B.contiguous())


def is_old(found: Mapping[Site, Matrices], targets: Targets, version: str | None, path: Path) -> bool:
    """Whether a file's pairs are in the layout before 0.19. Raises AdapterMismatch for shapes of neither, CheckpointError if none tells."""
    for site, matrices in found.items():
        if not any(_fits(site, matrices, turned) for turned in {False, not targets[site]}):
            shapes = " and ".join(str(tuple(m.shape)) for m in matrices)
            raise AdapterMismatch(
                f"the matrices of {site.name!r} are {shapes}; its {site.experts} experts of {site.d_out} × {site.d_in} need "
                f"({site.experts}·r, {site.d_in}) and ({site.d_out}, {site.experts}·r)"
            )
    layouts = [old for old in (False, True) if all(_fits(site, m, old and not targets[site]) for site, m in found.items())]
    if len(layouts) == 1 or all(targets[site] for site in found):
        return layouts[0]
    if not layouts or _release(version) == (0, 0):
        raise CheckpointError(
            f"{path}: the shapes of {next(iter(found)).name!r} and its like do not say whether PEFT wrote them before version 0.19, which "
            'turned them over, or since; add "peft_version" to the file, for example "0.18.1"'
        )
    return _release(version) < SINCE


def _fits(site: Site, matrices: Matrices, turned: bool) -> bool:
    first, second = matrices
    assert site.experts is not None
    inner, outer = (site.d_out, site.d_in) if turned else (site.d_in, site.d_out)
    ranks = first.shape[0]
    return first.shape == (ranks, inner) and second.shape == (outer, ranks) and ranks > 0 and ranks % site.experts == 0


# -------------------------------------------------------------------------------------------------------------------------- the keys
def unwrapped(
    tensors: Mapping[str, Tensor], entries: Collection[str], targets: Targets, version: str | None, path: Path
) -> dict[str, Tensor]:
    """A file's tensors with those of parameters under the parameters' own paths, a stack's as A [E, r, d_in] and B [E, d_out, r].
    `entries`: the configuration's target_parameters."""
    adapted = [site for site in targets if targeted(site.name, entries)]
    names = [site.name for site in adapted]
    out, found = dict(tensors), {}
    for site in adapted:
        keys = [PREFIX + holder(site.name, names) + end for end in ENDS.values()]
        if missing := [key for key in keys if key not in tensors]:
            raise AdapterMismatch(f"{path} adapts {site.name!r}, and the tensor {missing[0]!r} is not there")
        found[site] = out.pop(keys[0]), out.pop(keys[1])
    wrappers = tuple(f"{PREFIX}{site.module}{part}" for site in targets for part in (f"{WRAPPED}.", ".lora_"))
    if stray := [key for key in out if key.startswith(wrappers) or f"{WRAPPED}.lora_" in key]:
        raise AdapterMismatch(
            f"tensor {stray[0]!r} belongs to a parameter that {path} does not name among its target_parameters, or that is no site here"
        )
    stacks = {site: matrices for site, matrices in found.items() if site.experts is not None}
    old = bool(stacks) and is_old(stacks, targets, version, path)
    for site, (first, second) in found.items():
        pair = (first, second) if site.experts is None else unpack(first, second, site.experts, turned=old and not targets[site])
        out |= {PREFIX + site.name + end: tensor for end, tensor in zip(ENDS.values(), pair, strict=True)}
    return out


def holder(name: str, names: Sequence[str]) -> str:
    """The path of the wrapper that holds a parameter's pair, of these adapted parameters in the order of declaration."""
    module = name.rpartition(".")[0]
    inside = [other for other in names if other.rpartition(".")[0] == module]
    return module + WRAPPED * (len(inside) - 1 - inside.index(name))


def targeted(name: str, entries: Collection[str]) -> bool:
    """PEFT's own rule of whether `target_parameters` means this parameter."""
    return any(matches_entry(entry, name) for entry in entries)


# ----------------------------------------------------------------------------------------------------------------- the configuration
def parameter_fields(config: Mapping[str, Any], names: Sequence[str], model: nn.Module | None, *, old: bool) -> dict[str, Any]:
    """What the configuration says of these adapted parameters: as it says it, if that means them, or else by the shortest names."""
    if not names:
        return {"target_parameters": None}
    others = {name for name, _ in model.named_parameters() if not ours(name)} - set(names) if model is not None else set()
    before = config["target_parameters"] or ()
    same = all(targeted(name, before) for name in names) and not any(targeted(other, before) for other in others)
    found = before if same and model is not None else shortest(names, others, whole=model is None)
    if found is None:
        raise NotExportable(f"no list of names means {names[0]!r} and its like alone in this model, and PEFT takes nothing else")
    version = VERSION if _release(config["peft_version"]) < SINCE else config["peft_version"]
    return {"target_parameters": found, "peft_version": BEFORE if old else version}


def _release(version: str | None) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found is not None else (0, 0)


def refuse_taken(modules: Collection[str], model: nn.Module | None) -> None:
    """Raise NotExportable for modules that PEFT would take for parts of the mixture."""
    taken = TAKEN.get(getattr(getattr(model, "config", None), "model_type", None) or "", ())
    lost = [name for name in modules if name.rpartition(".")[2] in taken]
    if lost:
        raise NotExportable(
            f"PEFT takes {lost[0].rpartition('.')[2]!r} in a model of type {model.config.model_type!r} for its experts or their router, "  # type: ignore[union-attr]
            f"and would not load {len(lost)} modules ({lost[0]}, …)"
        )
