"""A tree of mixes in a YAML file:

    how: linear                  any mixer
    weights: [1.0, -0.5]         one for each entry of `of`; an entry may be {pattern: weight}
    space: delta+svd:16
    of:
      - adapters/math            a folder, relative to the file
      - how: ties                or another mix
        density: 0.3
        of: [adapters/a, adapters/b]

mergekit's names are read, too: `merge_method` for how, `models` for of, and in it {model: FOLDER, parameters: {weight: 0.7}}; options under
`parameters` are those of the mixer, and `lambda` is `scale`. What a `merge_method` leaves unsaid is as it is there: weights, densities and
scales are 1, and `linear` divides by the sum of the weights (our `average`) unless `normalize` is false. Its `epsilon` is half of ours.
`base_model` and `dtype` are passed over: adapters know their base, and what comes out is fp32.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from lorakit.adapters.mix.mix import mix, mix_into
from lorakit.adapters.mix.mixers import MIXERS
from lorakit.adapters.mix.work import Stats
from lorakit.core.adapter import Adapter
from lorakit.core.errors import BadParameter

SIZE_LIMIT = 2**20
DEPTH = 16
NODES = 4096
"""Folders and mixes of a tree, those that YAML's aliases repeat as often as they stand."""


class Mix(BaseModel):
    """One mix, of folders and of other mixes."""

    model_config = ConfigDict(extra="forbid")

    of: list["str | Mix"]
    how: str = "linear"
    weights: list[float | dict[str, float]] | None = None
    space: str = "delta"
    seed: int = 0
    options: dict[str, Any] = {}


Load = Callable[[str], Adapter]
OWN = ("of", "how", "weights", "space", "seed")
PASSED = ("base_model", "dtype")


def read_recipe(path: str | Path) -> Mix:
    """The tree in a file. Raises BadParameter, naming the file and the place in it."""
    path = Path(path)
    if not path.is_file():
        raise BadParameter(f"there is no recipe {path}")
    if path.stat().st_size > SIZE_LIMIT:
        raise BadParameter(f"{path} has {path.stat().st_size} bytes; a recipe has no more than {SIZE_LIMIT}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise BadParameter(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if found is None:
        raise BadParameter(f"{path} is empty; expected a mix with `how` and `of`, as in of: [adapters/a, adapters/b]")
    try:
        return Mix.model_validate(_normal(found, path, path.parent, DEPTH, itertools.count(1)))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadParameter(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def made(tree: Mix, *, load: Load, force: bool = False, stats: Stats | None = None) -> Adapter:
    """The adapter that a tree describes; `load` opens its folders. `stats` are those of the uppermost mix."""
    return mix(_parts(tree, load, force), space=tree.space, **_uppermost(tree, force, stats))


def made_into(tree: Mix, model: nn.Module, *, load: Load, force: bool = False, stats: Stats | None = None) -> dict[str, Any]:
    """The uppermost mix of a tree into the base, as `mix_into`."""
    if tree.space != "delta":
        raise BadParameter(f"space {tree.space!r}: into the base everything goes as ΔW itself, uncut; leave the space out")
    return mix_into(model, _parts(tree, load, force), **_uppermost(tree, force, stats))


def _parts(tree: Mix, load: Load, force: bool) -> list[Adapter]:
    return [load(part) if isinstance(part, str) else made(part, load=load, force=force) for part in tree.of]


def _uppermost(tree: Mix, force: bool, stats: Stats | None) -> dict[str, Any]:
    return {"how": tree.how, "weights": tree.weights, "seed": tree.seed, "force": force, "stats": stats, **tree.options}


def _normal(node: Any, path: Path, folder: Path, depth: int, count: Iterator[int]) -> Any:
    """A node in our own names, its folders seen from the file's; each takes a number of `count`."""
    if depth == 0:
        raise BadParameter(f"{path}: mixes are nested more than {DEPTH} deep")
    if next(count) > NODES:
        raise BadParameter(f"{path} has more than {NODES} folders and mixes")
    if isinstance(node, str):
        return str(folder / node)
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        raise BadParameter(f"{path}: {str(node)[:60]!r} is neither a folder nor a mix with `how` and `of`")
    node = dict(node)
    options = dict(_parameters(node, path))
    for key in ("parameters", *PASSED):
        node.pop(key, None)
    foreign = "merge_method" in node
    for theirs, ours in (("merge_method", "how"), ("models", "of")):
        if theirs in node and ours in node:
            raise BadParameter(f"{path}: a mix has {theirs!r} and {ours!r}, which mean the same; leave one out")
        if theirs in node:
            node[ours] = node.pop(theirs)
    entries = node.get("of")
    if not isinstance(entries, list):
        raise BadParameter(f"{path}: a mix has no list `of` of folders and mixes")
    weights = [_weight(entry, path) for entry in entries]
    if any(weight is not None for weight in weights):
        node.setdefault("weights", [1.0 if weight is None else weight for weight in weights])
    bare = [entry["model"] if isinstance(entry, dict) and "model" in entry else entry for entry in entries]
    node["of"] = [_normal(entry, path, folder, depth - 1, count) for entry in bare]
    options |= {key: node.pop(key) for key in list(node) if key not in OWN}
    if "lambda" in options:
        options["scale"] = options.pop("lambda")
    return _as_mergekit({**node, "options": options}) if foreign else {**node, "options": options}


DEFAULTS = {"density": 1.0, "scale": 1.0, "epsilon": 0.3}


def _as_mergekit(node: dict[str, Any]) -> dict[str, Any]:
    """With its defaults where nothing is said."""
    how, options = node["how"], dict(node["options"])
    if how == "linear" and options.pop("normalize", True):
        how = "average"
    known = MIXERS[how].options if how in MIXERS else {}
    if isinstance(options.get("epsilon"), float):
        options["epsilon"] *= 2
    return {
        **node,
        "how": how,
        "options": {key: value for key, value in DEFAULTS.items() if key in known} | options,
        "weights": node.get("weights") or [1.0] * len(node["of"]),
    }


def _weight(entry: Any, path: Path) -> Any:
    """mergekit's place for it."""
    if not isinstance(entry, dict) or "model" not in entry:
        return None
    beside = entry.keys() - {"model", "parameters"}
    if beside:
        raise BadParameter(
            f"{path}: {min(beside, key=str)!r} stands beside the model {str(entry['model'])[:60]}; what is said of a model stands under "
            "parameters, as in {model: a, parameters: {weight: 0.7}}"
        )
    found = _parameters(entry, path)
    if found.keys() - {"weight"}:
        raise BadParameter(
            f"{path}: {min(found.keys() - {'weight'})!r} of a single model ({str(entry['model'])[:60]}) is not known here; a mixer has the "
            "same options for all that it puts together"
        )
    return found.get("weight")


def _parameters(node: dict[str, Any], path: Path) -> dict[str, Any]:
    found = node.get("parameters") or {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise BadParameter(f"{path}: parameters are {str(found)[:60]!r}; expected names and values, as in parameters: {{weight: 0.7}}")
    return found
