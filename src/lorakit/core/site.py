"""A site is one place in a model where a weight can be adapted.

Convention everywhere: W is d_out × d_in, A is r × d_in, B is d_out × r. An embedding's site has d_in = vocabulary and d_out = dimension.
Fused projections (GPT-2 `c_attn`, GPT-NeoX `query_key_value`, Phi `qkv_proj`) are one site as a whole, and one site per part, named
`c_attn[q]`, whose `rows` are the output rows of that part: ranges, because GPT-NeoX interleaves them head by head.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lorakit.core.errors import NoSuchSite, did_you_mean
from lorakit.core.generated import plain_type

Kind = Literal["linear", "embedding"]

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
OTHER_ORDER = ("codegen", "gpt_bigcode")  # model types whose fused rows are in an order of their own: adapted whole only
PRESETS: dict[str, Callable[["Site"], bool]] = {
    "all-linear": lambda s: s.kind == "linear" and s.rows is None and s.role != "head",
    "attention": lambda s: s.kind == "linear" and s.rows is None and s.role in ATTENTION,
    "mlp": lambda s: s.kind == "linear" and s.rows is None and s.role in MLP,
    "qv": lambda s: s.kind == "linear" and s.role in ("q", "v"),
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

    @property
    def module(self) -> str:
        """Path of the module that holds the weight (the name without `[part]`)."""
        return self.name.split("[")[0]


Where = str | Sequence[str] | Callable[[Site], bool]


def supported(module: nn.Module) -> Kind | None:
    """The site kind of a module whose forward is the plain one; subclasses with their own forward are left alone."""
    forward = plain_type(module).forward
    if forward is nn.Linear.forward or _is_conv1d(module):
        return "linear"
    return "embedding" if forward is nn.Embedding.forward else None


def _is_conv1d(module: nn.Module) -> bool:
    kind = plain_type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a supported module, in the convention of this project."""
    rows, cols = module.weight.shape  # type: ignore[misc]
    transposed = _is_conv1d(module) or supported(module) == "embedding"
    return (int(cols), int(rows)) if transposed else (int(rows), int(cols))


def sites_of(model: nn.Module) -> list[Site]:
    """Every site of a model, fused parts included, in module order."""
    found: list[Site] = []
    for name, module in model.named_modules():
        kind = supported(module)
        if kind is None or ".lora." in f".{name}.":
            continue
        d_out, d_in = weight_shape(module)
        site = Site(name, kind, d_in, d_out, _layer(name), _embedding_role(name) if kind == "embedding" else _role(name))
        found += [site, *_parts(model, site)]
    return found


def select(model: nn.Module, where: Where) -> list[Site]:
    """Sites chosen by a preset, a name or suffix, a glob, `re:` regex, a list of those, or a predicate.

    Raises NoSuchSite when any entry matches nothing (a list that half matches is an error, not a warning), naming the closest sites.
    """
    sites = sites_of(model)
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
    return f"sites entry {entry!r} matches no linear or embedding module of this model. {did_you_mean(entry, names)}".strip()


def _without_overlap(sites: list[Site]) -> list[Site]:
    whole = {s.name for s in sites if s.rows is None}
    for s in sites:
        if s.rows is not None and s.module in whole:
            raise NoSuchSite(f"sites names both {s.module!r} and its part {s.name!r}; choose one")
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
        Site(f"{site.name}[{role}]", site.kind, site.d_in, sum(map(len, ranges)), site.layer, role, ranges)
        for role, ranges in rows.items()
    ]  # fmt: skip


def _gate_up_rows(model: nn.Module, site: Site) -> dict[str, tuple[range, ...]]:
    half = site.d_out // 2
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
