"""LORA: ΔW = s · B · A.

    base_model.model.<module>.lora_A.weight [r, in] · lora_B.weight [out, r] · lora_magnitude_vector [out]
    base_model.model.<embedding>.lora_embedding_A [r, vocabulary] · lora_embedding_B [dim, r]

With `use_dora` the rows are rescaled to the magnitude; with `init_lora_weights: pissa` the base is without its principal part.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.pair import Pair, by_module
from lorakit.adapters.peft_experts import Targets, holder, pack, unwrapped
from lorakit.adapters.peft_fields import COMMON, FOLLOWED, TARGETS, by_pattern, names, number, positive, switch
from lorakit.adapters.peft_rank import config_of, expressed, rank_in, trimmed
from lorakit.adapters.peft_type import Form, Found, Part, Table, argument
from lorakit.adapters.peft_types.pairs import PairType, check_pair
from lorakit.core.adapter import Adapter
from lorakit.core.errors import AdapterMismatch, NotExportable
from lorakit.core.lowrank import LowRankSpec
from lorakit.core.site import MODULES, Kind, Site

CONFIG: dict[str, Any] = {
    **COMMON,
    **TARGETS,
    "peft_type": "LORA",
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
READ = FOLLOWED | {
    "alpha_pattern", "eva_config", "init_lora_weights", "lora_alpha", "lora_dropout", "megatron_core", "qalora_group_size", "r",
    "rank_pattern", "target_parameters", "use_dora", "use_rslora",
}  # fmt: skip

HARMLESS = (True, False, "gaussian", "eva", "orthogonal")
"""Inits that leave the base alone: of a finished adapter they say nothing any more."""
INITS = (*HARMLESS, "pissa")
"""Of those that change the base only PiSSA's exact one can be repeated exactly."""
CHANGED_BASE = "it changed the base in a way that loading cannot repeat exactly; save it with path_initial_model_for_weight_conversion"

RECIPES = {
    ((False, False), "linear"): "lora",
    ((False, False), "sqrt"): "rslora",
    ((True, False), "linear"): "dora",
    ((False, True), "linear"): "pissa",
}
"""By (use_dora, PiSSA) and the rule of the scale."""


def refuse_init(config: Mapping[str, Any], path: Path) -> None:
    """Raise NotExportable for a start that changed the base."""
    init = config["init_lora_weights"]
    if init not in INITS:
        raise NotExportable(f"{path}: init_lora_weights={init!r} cannot be followed: {CHANGED_BASE}")
    if init == "pissa" and config["use_dora"]:
        raise NotExportable(f"{path}: PiSSA together with DoRA cannot be followed: the magnitude is that of the residual")


def harmless(carried: Mapping[str, Any]) -> Any:
    """What to say of a start that left the base alone: as it was said."""
    init = carried.get("init_lora_weights", True)
    return init if init in HARMLESS else True


# --------------------------------------------------------------------------------------------------------------------- its own forms
def dora(adapter: Adapter, model: nn.Module | None) -> Form[Pair] | None:
    """The pair of the direction and the magnitude m."""
    spec, deltas = adapter.method().delta, adapter.deltas()
    if not isinstance(spec, LowRankSpec):
        return None
    factors = {site: deltas[site.name].factors() for site in adapter.sites}
    if missing := [site.name for site in factors if "m" not in adapter.of(site)]:
        raise AdapterMismatch(f"the tensor {missing[0]}.m is missing: DoRA has a magnitude at every site")
    pairs = [(site, Pair(site.kind, f.A, f.B, f.s, m=adapter.of(site)["m"])) for site, f in factors.items() if f is not None]
    modules, even = by_module(pairs, model)
    return Form(modules, spec.rank, fields={"use_dora": True}, restorable=even)


def pissa(adapter: Adapter, model: nn.Module | None) -> Form[Pair] | None:
    """A and B; only where PEFT's own start is the same one: the exact SVD of a whole linear weight, and nothing for an embedding."""
    spec = adapter.method().delta
    if argument(adapter, "niter") or not isinstance(spec, LowRankSpec):
        return None
    pairs = {}
    for site in adapter.sites:
        tensors = adapter.of(site)
        if site.rows is not None or (site.kind == "embedding" and tensors["B0"].any()):
            return None
        pairs[site.name] = Pair(site.kind, tensors["A"], tensors["B"], spec.rank.named(site.name)[1])
    return Form(pairs, spec.rank, fields={"init_lora_weights": "pissa"}, restorable=True)


class Lora(PairType):
    """The type that everything of the form s·B·A can be written as."""

    table = Table(
        name="LORA",
        config=CONFIG,
        followed=READ,
        fits={
            "alpha_pattern": by_pattern(number),
            "rank_pattern": by_pattern(positive),
            "r": positive,
            "target_parameters": lambda v: names(v) and not isinstance(v, str),
            **dict.fromkeys(("use_dora", "use_rslora"), switch),
            **dict.fromkeys(("lora_alpha", "lora_dropout"), number),
        },
        patterns=("alpha_pattern", "rank_pattern"),
        keys={
            "linear": {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
            "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
            "experts": {"A": "lora_A.weight", "B": "lora_B.weight"},
            "router": {"A": "lora_A.weight", "B": "lora_B.weight"},
        },
        bias="lora_only",
        dropout="lora_dropout",
        native={"dora": dora, "pissa": pissa},
    )

    def refuse(self, config: Mapping[str, Any], path: Path) -> None:
        refuse_init(config, path)

    def said(self, form: Form[Pair], carried: Mapping[str, Any]) -> dict[str, Any]:
        preferred = ([rank_in(carried)] if carried else []) + ([trimmed(form.rank, form.modules)] if form.rank is not None else [])
        wanted = {name: (pair.r, pair.s) for name, pair in form.modules.items()}
        init = {} if "init_lora_weights" in form.fields else {"init_lora_weights": harmless(carried)}
        return init | config_of(expressed(wanted, *preferred))

    def opened(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], targets: Targets, path: Path) -> Mapping[str, Tensor]:
        return unwrapped(tensors, config["target_parameters"] or (), targets, config["peft_version"], path)

    def placed(self, form: Form[Pair], *, old: Collection[str] = ()) -> dict[str, tuple[Kind, Mapping[str, Tensor]]]:
        parameters = [name for name, pair in form.modules.items() if pair.kind not in MODULES]
        out: dict[str, tuple[Kind, Mapping[str, Tensor]]] = {}
        for name, pair in form.modules.items():
            tensors = pair.tensors
            if pair.kind == "experts":
                tensors = dict(zip("AB", pack(pair.A, pair.B, turned=name in old), strict=True))
            out[holder(name, parameters) if name in parameters else name] = pair.kind, tensors
        return out

    def module(self, name: str, part: Part, config: Mapping[str, Any], path: Path) -> Pair:
        parts = check_pair(name, part, frozenset({"A", "B", "m"} if config["use_dora"] else {"A", "B"}), path)
        r, s = rank_in(config).named(name)
        kind: Kind = "experts" if parts["A"].ndim == 3 else "router" if name.endswith(".weight") else part.kind
        pair = Pair(kind, s=s, **parts)
        if pair.r != r:
            raise AdapterMismatch(f"module {name!r} has {pair.r} ranks, and {path} gives it r={r}")
        return pair

    def closest(self, found: Found[Pair], sites: Sequence[Site]) -> tuple[str, dict[str, Any], dict[str, Pair]]:
        """LoRA, rsLoRA, DoRA or PiSSA."""
        config = found.config
        pairs = {site.name: fitted(found.modules[site.name], site) for site in sites}
        special = (config["use_dora"], config["init_lora_weights"] == "pissa")
        rank = trimmed(rank_in(config), pairs)
        preferred = [] if any(special) and rank.rule != "linear" else [rank]  # those recipes know that rule only; it can say any scale
        rank = expressed({name: (pair.r, pair.s) for name, pair in pairs.items()}, *preferred)
        patterns = {"rank_pattern": dict(rank.rank_pattern), "alpha_pattern": dict(rank.alpha_pattern)}
        kwargs = {"r": rank.r, "alpha": float(rank.alpha), **{k: v for k, v in patterns.items() if v}}
        return RECIPES[special, rank.rule], kwargs, pairs


def fitted(pair: Pair, site: Site) -> Pair:
    """PEFT allows ranks beyond the matrix; the same B·A then has factors of its smaller side."""
    side = min(site.d_in, site.d_out)
    if pair.r <= side:
        return pair
    BA = (pair.B.double() @ pair.A.double()).to(pair.A.dtype)
    one = torch.eye(side).expand(*BA.shape[:-2], side, side)
    A, B = (BA, one) if site.d_out <= site.d_in else (one, BA)
    return Pair(pair.kind, A, B, pair.s, m=pair.m)
