"""A kohya or LyCORIS file read as an adapter: exactly where its changes have factors, else cut to a rank (cut.py).

    lora, loha, lokr, glora            plain LoRA of the exact rank
    … all of them with dora_scale      `dora`
    lokr, where that would be larger   `krona`, which keeps w1 and w2 as they are, if all modules share its factors
    full, ia3, and a full lokr         plain LoRA only with a cut
    diff_b, w_norm, b_norm             whole parameters beside it: the model's own value and what the file adds

What depends on W, and whole parameters, need the model.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lorakit.adapters.cut import ADVICE, Change, Closest, Cut, bounded, cut_all, recorded, to_plain, with_whole
from lorakit.adapters.kohya import Trained, full, kron, rank_of, read_modules, sides, size_of
from lorakit.adapters.kohya_names import Places, guessed
from lorakit.adapters.plain import plain_lora
from lorakit.core.adapter import UNFROZEN, Adapter
from lorakit.core.base import base_of
from lorakit.core.errors import AdapterMismatch, BadParameter, NotExportable
from lorakit.core.method import get_method
from lorakit.core.site import Site

META = "kohya"
"""Where the result's meta says which algorithms the file was made with."""


def from_kohya(path: str | Path, *, model: nn.Module | None = None, only: str | None = None, cut: Cut | None = None) -> Adapter:
    """The adapter in a file, as `closest_in` makes it."""
    return closest_in(path, model=model, only=only, cut=cut).adapter


def closest_in(path: str | Path, *, model: nn.Module | None = None, only: str | None = None, cut: Cut | None = None) -> Closest:
    """The adapter in a file, exactly, or with a `cut` as the closest plain LoRA and its errors.

    Args:
        model: the Transformers model that was trained. Without it the names of modules are guessed, and nothing that needs W is read.
        only: the modules whose names begin so ("lora_te1"), where a file holds those of several models.

    Raises CheckpointError for a file that cannot be read, AdapterMismatch for tensors that fit neither each other nor the model, and
    NotExportable for what lorakit has no form for.
    """
    modules = read_modules(path, only=only)
    places = None if model is None else Places(model)
    whole = _whole(modules, places, model)
    placed = [_placed(module, places, model) for module in modules if module.algo != "norm"]
    if not placed:
        raise NotExportable(f"{path} changes {len(whole)} vectors and no matrix: there is no LoRA in it")
    twice = [name for name, n in Counter(site.name for _, site, _ in placed).items() if n > 1]
    if twice:
        raise AdapterMismatch(f"{path}: several modules are {twice[0]} of this model")
    meta = {META: {"algorithms": dict(Counter(module.algo for module in modules))}}
    if any("dora_scale" in module.tensors for module, _, _ in placed):
        return _dora(placed, whole, meta, cut, model)
    if cut is not None:
        factors, errors, total = cut_all(((site, change) for _, site, change in placed), cut)
        plain = with_whole(plain_lora([site for _, site, _ in placed], factors, meta), whole)
        return Closest(recorded(plain, cut, "kohya", errors, total), errors, total)
    return Closest(_exact(placed, whole, meta))


Placed = tuple[Trained, Site, Change]


def _placed(module: Trained, places: Places | None, model: nn.Module | None) -> Placed:
    if places is None or model is None:
        change = _made(module, None)
        return module, guessed(module.name, *sides(change)), change
    site = places.site(module.name)
    needed = module.algo in ("glora", "ia3")
    change = _made(module, base_of(model.get_submodule(site.module), site.attribute).dense(torch.float32).cpu() if needed else None)
    if sides(change) != (site.d_out, site.d_in):
        d_out, d_in = sides(change)
        raise AdapterMismatch(f"the file's {module.name} is {d_out} × {d_in}; in this model {site.name} is {site.d_out} × {site.d_in}")
    return module, site, change


def _made(module: Trained, W: Tensor | None) -> Change:
    change = module.change(W)
    assert change is not None
    return change


def _exact(placed: Sequence[Placed], whole: Mapping[str, Tensor], meta: dict[str, Any]) -> Adapter:
    wide = [module for module, _, change in placed if full(change) and module.algo != "lora"]  # which is as wide as its writer wanted
    if wide:
        own = _krona(placed, meta) if not whole else None
        if own is None:
            raise NotExportable(
                f"{len(wide)} of the file's modules ({wide[0].name}: {wide[0].algo}, …) are too wide for an exact plain LoRA; {ADVICE}"
            )
        return own
    factors = {site.name: bounded(change) for _, site, change in placed if not isinstance(change, Tensor)}
    return with_whole(plain_lora([site for _, site, _ in placed], factors, meta), whole)


def _krona(placed: Sequence[Placed], meta: dict[str, Any]) -> Adapter | None:
    """All of them as Kronecker products, where one pair of factors means every module's shapes."""
    if any(module.algo != "lokr" or any(t.ndim > 2 for t in module.tensors.values()) for module, _, _ in placed):
        return None
    halves = {site.name: kron(module) for module, site, _ in placed}
    sites = [site for _, site, _ in placed]
    largest = tuple(max(w1.shape[i] for w1, _ in halves.values()) for i in (0, 1))
    names = [f"re:{re.escape(site.name)}" for site in sites]
    for factor_out, factor_in in ((-1, -1), largest):
        recipe = get_method("krona", factor_out=factor_out, factor_in=factor_in, sites=tuple(names)).recipe
        assert recipe is not None
        tensors = {f"{name}.{key}": w.contiguous() for name, pair in halves.items() for key, w in zip(("w1", "w2"), pair, strict=True)}
        adapter = Adapter(recipe, tuple(sites), tensors, meta)
        if _takes(adapter):
            return adapter
    return None


def _takes(adapter: Adapter) -> bool:
    try:
        adapter.build("meta")
    except (AdapterMismatch, BadParameter):
        return False
    return True


def _dora(placed: Sequence[Placed], whole: Mapping[str, Tensor], meta: dict[str, Any], cut: Cut | None, model: nn.Module | None) -> Closest:
    """`dora` with the factors of whatever algorithm, and dora_scale as m."""
    magnitudes: dict[str, Tensor] = {}
    for module, site, _ in placed:
        m = module.tensors.get("dora_scale")
        if m is None:
            raise NotExportable(f"the file has DoRA's dora_scale at some modules and not at {module.name}: lorakit's dora has it at all")
        if m.shape[0] != site.d_out or m.numel() != site.d_out:
            raise NotExportable(
                f"{module.name}.dora_scale {list(m.shape)} has a size for each column of W ({site.d_out} × {site.d_in}), lorakit's dora "
                "one for each row (wd_on_output): merge it with the tool that trained it"
            )
        magnitudes[site.name] = m.flatten()
    plain = _exact([*placed], {}, meta)
    if plain.recipe.name != "lora":
        raise NotExportable(f"DoRA over {plain.recipe.name}: lorakit's dora has low-rank factors alone")
    recipe = get_method("dora", **plain.recipe.kwargs).recipe
    assert recipe is not None
    own = {f"{name}.m": m.contiguous() for name, m in magnitudes.items()}
    exact = with_whole(dataclasses.replace(plain, recipe=recipe, tensors={**plain.tensors, **own}), whole)
    return Closest(exact) if cut is None else to_plain(exact, cut, model=model)


def _whole(modules: Sequence[Trained], places: Places | None, model: nn.Module | None) -> dict[str, Tensor]:
    """Parameters that are trained whole: those of the model, and what the file adds to them."""
    found: dict[str, Tensor] = {}
    for module in modules:
        for name, change in module.vectors.items():
            if places is None or model is None:
                raise NotExportable(f"{module.name} adds to a whole {name}, which is read with the model it is for: give it (--model)")
            path = f"{places.path(module.name)}.{name}"
            own = dict(model.get_submodule(path.rpartition(".")[0]).named_parameters(recurse=False)).get(name)
            if own is None or own.shape != change.shape:
                shape = "has none" if own is None else f"has {list(own.shape)}"
                raise AdapterMismatch(f"the file adds {list(change.shape)} to {path}; the model {shape}")
            found[UNFROZEN + path] = own.detach().cpu().float() + change
    return found


# -------------------------------------------------------------------------------------------------------------------- what there is
@dataclass(frozen=True)
class FileReport:
    """What `lorakit inspect FILE` prints: of each module its name in the file, its path, algorithm, shape, a bound of the rank, alpha and
    ‖ΔW‖; None where that depends on W and the model is not given."""

    file: str
    modules: list[dict[str, Any]]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def table(self) -> Table:
        """For people."""
        algos = ", ".join(f"{n} {algo}" for algo, n in Counter(m["algorithm"] for m in self.modules).items())
        table = Table(title=Text(f"{self.file}: {algos}, {self.bytes / 1e6:.2f} MB"))
        for column in ("module", "algorithm", "shape", "rank", "alpha", "norm"):
            table.add_column(column, justify="left" if column in ("module", "algorithm") else "right", overflow="fold")
        for m in self.modules:
            shape = "" if m["shape"] is None else "×".join(map(str, m["shape"]))
            figures = ("" if m[key] is None else f"{m[key]:.4g}" for key in ("rank", "alpha", "norm"))
            table.add_row(Text(m["path"] or m["name"]), m["algorithm"], shape, *figures)
        return table


def inspect_file(path: str | Path, *, model: nn.Module | None = None, only: str | None = None) -> FileReport:
    """Raises what `closest_in` raises for files that cannot be read, or do not fit the model."""
    modules = read_modules(path, only=only)
    places = None if model is None else Places(model)
    return FileReport(Path(path).name, [_row(m, places, model) for m in modules], Path(path).stat().st_size)


def _row(module: Trained, places: Places | None, model: nn.Module | None) -> dict[str, Any]:
    change, path = None, None if places is None else places.path(module.name)
    if module.algo not in ("norm", "glora", "ia3") or (model is not None and module.algo != "norm"):
        _, site, change = _placed(module, places, model)
        path = site.name
    alpha = module.tensors.get("alpha")
    return {
        "name": module.name,
        "path": path,
        "algorithm": module.algo + (" + dora" if "dora_scale" in module.tensors else ""),
        "shape": None if change is None else list(sides(change)),
        "rank": None if change is None else rank_of(change),
        "alpha": None if alpha is None else alpha.item(),
        "norm": None if change is None else size_of(change),
    }
