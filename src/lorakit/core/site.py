"""A site is one place in a model where a weight can be adapted.

Convention everywhere: W is d_out × d_in, A is r × d_in, B is d_out × r. An embedding's site has d_in = vocabulary and d_out = dimension.
Fused projections (GPT-2 `c_attn`, GPT-NeoX `query_key_value`, Phi `qkv_proj`) are one site as a whole, and one site per part, named
`c_attn[q]`, whose `rows` are the output rows of that part: ranges, because GPT-NeoX interleaves them head by head.

The experts of a mixture are stacked in two parameters of one module (core/experts.py): one site each, `mlp.experts.gate_up_proj` and
`mlp.experts.down_proj`, for all experts together. There W is E × d_out × d_in, A is E × r × d_in, B is E × d_out × r. Their router is the
site `mlp.gate.weight` (core/router.py).
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lorakit.core.errors import AdapterMismatch, NoSuchSite, did_you_mean
from lorakit.core.experts import stack_shape, stacked
from lorakit.core.generated import plain_type
from lorakit.core.router import routes

Kind = Literal["linear", "embedding", "experts", "router"]
MODULES: frozenset[Kind] = frozenset({"linear", "embedding"})
"""The kinds of sites that every part of a method must be capable of."""
MIXTURES: frozenset[Kind] = MODULES | {"experts", "router"}
"""The `kinds` of a part that says it knows the weights of mixtures too: stacks of matrices, and one that only its own module reads."""

ROLES = {
    "q": ("q_proj", "q", "query", "q_lin", "q_attn", "wq"),
    "k": ("k_proj", "k", "key", "k_lin", "wk"),
    "v": ("v_proj", "v", "value", "v_lin", "wv"),
    "o": ("o_proj", "o", "out_proj", "out_lin", "wo"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "qkv"),
    "gate": ("gate_proj", "wi_0", "w1"),
    "up": ("up_proj", "wi_1", "wi", "c_fc", "dense_h_to_4h", "fc1", "lin1", "w3"),
    "down": ("down_proj", "wo_mlp", "dense_4h_to_h", "fc2", "lin2", "w2"),
    "gate_up": ("gate_up_proj",),
    "head": ("lm_head", "embed_out", "score", "classifier", "pre_classifier", "classification_head", "cls", "qa_outputs"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
ATTENTION = ("q", "k", "v", "o", "qkv")
MLP = ("gate", "up", "down", "gate_up")
TOKENS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
ROOT = "lora_shared"  # the module at the model's root that holds what an adapter's sites share
OTHER_ORDER = ("codegen", "gpt_bigcode")  # model types whose fused rows are in an order of their own: adapted whole only
PRESETS: dict[str, Callable[["Site"], bool]] = {
    "all-linear": lambda s: s.kind in ("linear", "experts") and s.rows is None and s.role != "head",
    "linear-modules": lambda s: s.kind == "linear" and s.rows is None and s.role != "head",
    "attention": lambda s: s.kind == "linear" and s.rows is None and s.role in ATTENTION,
    "mlp": lambda s: s.kind in ("linear", "experts") and s.rows is None and s.role in MLP,
    "experts": lambda s: s.kind == "experts" and s.rows is None,
    "router": lambda s: s.kind == "router",
    "qk": lambda s: s.kind == "linear" and s.role in ("q", "k"),
    "qv": lambda s: s.kind == "linear" and s.role in ("q", "v"),
    "kv": lambda s: s.kind == "linear" and s.role in ("k", "v"),
    "attention-output": lambda s: s.kind == "linear" and s.role == "o",
    "mlp-output": lambda s: s.kind == "linear" and s.role == "down",
    "embedding": lambda s: s.role == "embed",
}


@dataclass(frozen=True)
class Site:
    """One adaptable weight: `d_out` × `d_in`, or the output `rows` of one part of a fused weight."""

    name: str
    kind: Kind
    d_in: int
    d_out: int
    layer: int | None
    role: str
    rows: tuple[range, ...] | None = None
    experts: int | None = None
    """How many matrices of this shape are stacked; None for a single one."""

    @property
    def whole(self) -> str:
        """The name without `[part]`."""
        return self.name.split("[")[0]

    @property
    def module(self) -> str:
        """Path of the module that holds the weight."""
        return self.whole if self.kind in MODULES else self.whole.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """The weight's name in that module."""
        return "weight" if self.kind in MODULES else self.whole.rpartition(".")[2]


Where = str | Sequence[str] | Callable[[Site], bool]


@dataclass(frozen=True)
class Beyond:
    """What `where` selects, but for the sites of the first `layers` layers."""

    where: Where
    layers: int


def supported(module: nn.Module) -> Kind | None:
    """The site kind of a module whose forward is the plain one; subclasses with their own forward are left alone."""
    forward = plain_type(module).forward
    if forward is nn.Linear.forward or _is_conv1d(module):
        return "linear"
    return "embedding" if forward is nn.Embedding.forward else None


def _is_conv1d(module: nn.Module) -> bool:
    kind = plain_type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def ours(path: str) -> bool:
    """Whether a module or parameter path belongs to an adapter, not to the model."""
    return ".lora." in f".{path}." or f".{ROOT}." in f".{path}."


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a supported module, in the convention of this project."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not weight.is_floating_point():  # packed: its own shape says nothing
        return (module.nf, module.nx) if _is_conv1d(module) else (module.out_features, module.in_features)  # type: ignore[return-value]
    rows, cols = weight.shape
    transposed = _is_conv1d(module) or supported(module) == "embedding"
    return (int(cols), int(rows)) if transposed else (int(rows), int(cols))


def sites_of(model: nn.Module) -> list[Site]:
    """Every site of a model, fused parts included, in module order."""
    found: list[Site] = []
    for name, module in model.named_modules():
        kind = supported(module)
        if ours(name):
            continue
        if kind is not None:
            d_out, d_in = weight_shape(module)
            site = Site(name, kind, d_in, d_out, _layer(name), _embedding_role(name) if kind == "embedding" else _role(name))
            found += [site, *_parts(model, site)]
        for weight in stacked(module):
            experts, d_out, d_in = stack_shape(module, weight)
            path = f"{name}.{weight}".lstrip(".")
            site = Site(path, "experts", d_in, d_out, _layer(name), _role(path), experts=experts)
            found += [site, *_parts(model, site)]
        if routes(module):
            d_out, d_in = module.get_parameter("weight").shape
            found.append(Site(f"{name}.weight", "router", d_in, d_out, _layer(name), "router"))
    return found


def strange_stacks(model: nn.Module) -> list[str]:
    """Weights of experts in another form than those that are sites: they can only stay frozen."""
    own = [(path, module) for path, module in model.named_modules() if "expert" in path and not ours(path) and not stacked(module)]
    return [f"{path}.{name}" for path, module in own for name, p in module.named_parameters(recurse=False) if p.ndim >= 3]


def select(model: nn.Module, where: Where | Beyond) -> list[Site]:
    """Sites chosen by a preset, a name or suffix, a glob, `re:` regex, a list of those, or a predicate.

    Raises NoSuchSite when any entry matches nothing (a list that half matches is an error, not a warning), naming the closest sites.
    """
    return among(sites_of(model), where)


def among(sites: Sequence[Site], where: Where | Beyond) -> list[Site]:
    """`select` from all of a model's sites."""
    if isinstance(where, Beyond):
        return _beyond(among(sites, where.where), where.layers)
    if callable(where):
        chosen = [s for s in sites if where(s)]
        if not chosen:
            raise NoSuchSite(f"the predicate given as sites matches none of the model's {len(sites)} sites")
        return chosen
    entries = [where] if isinstance(where, str) else list(where)
    if not entries:
        raise NoSuchSite("sites is empty; give a preset such as 'all-linear', names, a glob or a regex")
    wanted: set[str] = set()
    for entry in entries:
        matched = [s.name for s in sites if _matches(s, entry)]
        if not matched:
            raise NoSuchSite(_nothing(entry, sites))
        wanted.update(matched)
    return _without_overlap([s for s in sites if s.name in wanted])


def _beyond(sites: list[Site], layers: int) -> list[Site]:
    kept = [s for s in sites if s.layer is None or s.layer >= layers]
    if layers < 0 or not kept:
        there = 1 + max(s.layer for s in sites if s.layer is not None)
        raise NoSuchSite(f"leaving out {layers} layers is not possible with sites in {there} layers; expected 0 to {there - 1}")
    return kept


def _matches(site: Site, entry: str) -> bool:
    if entry in PRESETS:
        return PRESETS[entry](site)
    if entry.startswith("re:"):
        try:
            return re.fullmatch(entry[3:], site.name) is not None
        except re.error as error:
            raise NoSuchSite(f"sites entry {entry!r} is not a regular expression: {error}") from None
    if "*" in entry or "?" in entry:
        return fnmatch.fnmatchcase(site.name, entry) and site.rows is None
    return site.name == entry or site.name.endswith("." + entry)


def _nothing(entry: str, sites: Iterable[Site]) -> str:
    names = {s.name.rsplit(".", 1)[-1] for s in sites} | {s.name for s in sites} | set(PRESETS)
    if entry in PRESETS:
        there = sorted({s.name.rsplit(".", 1)[-1] for s in sites})
        return f"no module of this model is known to be what the preset {entry!r} means; name them instead. There are: {', '.join(there)}."
    return f"sites entry {entry!r} matches no linear layer, embedding or experts of this model. {did_you_mean(entry, names)}".strip()


def _without_overlap(sites: list[Site]) -> list[Site]:
    whole = {s.name for s in sites if s.rows is None}
    for s in sites:
        if s.rows is not None and s.whole in whole:
            raise NoSuchSite(f"sites names both {s.whole!r} and its part {s.name!r}; choose one")
    return sites


def _layer(name: str) -> int | None:
    numbers = [int(p) for p in name.split(".") if p.isdigit()]
    return numbers[0] if numbers else None


def _role(name: str) -> str:
    parts = name.split(".")
    last = parts[-1]
    if any(ROLE_OF.get(part) == "head" for part in parts):  # RoBERTa's head has layers of its own: classifier.dense
        return "head"
    if last == "c_proj":
        return "o" if "attn" in parts else "down"
    if last == "wo" and "DenseReluDense" in parts:
        return "down"
    if last == "dense":  # BERT: attention.output.dense, intermediate.dense, output.dense; GPT-NeoX: attention.dense
        return "o" if "attention" in parts else "up" if "intermediate" in parts else "down" if "output" in parts else "other"
    return ROLE_OF.get(last, "other")


def _embedding_role(name: str) -> str:  # of tokens; not of positions, segments or relative distances
    return "embed" if name.rsplit(".", 1)[-1] in TOKENS else "other"


def _parts(model: nn.Module, site: Site) -> list[Site]:
    layout = {"qkv": _qkv_rows, "gate_up": _gate_up_rows}.get(site.role)
    rows = layout(model, site) if layout else {}
    return [
        Site(f"{site.name}[{role}]", site.kind, site.d_in, sum(map(len, ranges)), site.layer, role, ranges, site.experts)
        for role, ranges in rows.items()
    ]  # fmt: skip


def _gate_up_rows(model: nn.Module, site: Site) -> dict[str, tuple[range, ...]]:
    half = site.d_out // 2
    if site.kind == "experts" and not model.get_submodule(site.module).is_concatenated:  # gpt-oss: gate and up by turns
        return {role: tuple(range(i, i + 1) for i in range(start, site.d_out, 2)) for start, role in enumerate(("gate", "up"))}
    return {"gate": (range(half),), "up": (range(half, site.d_out),)}


def _qkv_rows(model: nn.Module, site: Site) -> dict[str, tuple[range, ...]]:
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None or getattr(config, "model_type", None) in OTHER_ORDER:
        return {}
    d = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    if site.name.endswith("query_key_value"):  # per head: q, k, v
        parts = {r: tuple(range((3 * h + i) * d, (3 * h + i + 1) * d) for h in range(heads)) for i, r in enumerate("qkv")}
        return parts if site.d_out == 3 * heads * d else {}
    kv = getattr(config, "num_key_value_heads", None) or heads
    if site.d_out != (heads + 2 * kv) * d:  # cross-attention, or heads grouped in another way
        return {}
    q, k = heads * d, (heads + kv) * d
    return {"q": (range(q),), "k": (range(q, k),), "v": (range(k, site.d_out),)}


def check_sites(sites: Iterable[Site], model: nn.Module) -> None:
    """Raise AdapterMismatch unless the model has every one of an adapter's sites, in its shape."""
    there = {site.name: site for site in sites_of(model)}
    for site in sites:
        found = there.get(site.name)
        if found is None:
            raise AdapterMismatch(f"the adapter has the site {site.name}, the model has no such weight; is it the adapter's base?")
        if (found.d_out, found.d_in, found.experts) != (site.d_out, site.d_in, site.experts):
            raise AdapterMismatch(
                f"{site.name} is {site.d_out} × {site.d_in} in the adapter and {found.d_out} × {found.d_in} in the model; is it its base?"
            )
