"""A saved adapter that a run goes on from (`init_adapter`), in place of a method's fresh start.

Taken over are its tensors, its method, that method's parameters, and the chat template where none is given. New are the data, the
optimizer's state, the learning rate, and what the method does over time: its controllers begin their schedules again. Parameters that make
the adapter what it is (rank, scale, sites) stay its own; those that say how it is trained (dropout, a rate, a schedule) may be given anew.
A classifier's head that the adapter does not bring starts fresh and is trained whole, as beside a fresh method.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import shorten
from typing import Any

from torch import nn

from lorakit.adapters.digest import digest
from lorakit.adapters.io import load_adapter
from lorakit.adapters.record import to_json
from lorakit.core.adapter import UNFROZEN, Adapter
from lorakit.core.attach import Adapted
from lorakit.core.errors import AdapterMismatch, BadParameter, Incompatible
from lorakit.core.fingerprint import Fingerprint
from lorakit.core.method import Method, describe, get_method
from lorakit.train.config import TrainConfig
from lorakit.train.source_model import head_of

FORM = ("delta", "combine", "sites", "unfreeze", "patches", "base")
"""The parts of a method that say what an adapter is; the others say how it is trained."""
DROPOUT = "dropout"
"""The parameter of a delta that acts in training alone."""
HISTORY = ("model", "train_data", "data_hash", "mix", "search", "start", "compressed", "init_adapter")
"""What its meta says of how it came to be, and the new adapter's repeats."""


@dataclass(frozen=True)
class Beginning:
    """The adapter, and the folder that it was read from."""

    folder: str
    adapter: Adapter

    @cached_property
    def sha256(self) -> str:
        """Of its tensors."""
        return digest(self.adapter.tensors)

    def facts(self) -> dict[str, Any]:
        """Which adapter it is: what must be equal for a run to be resumed. JSON values only."""
        recipe = self.adapter.recipe
        return {"method": recipe.name, "parameters": json.loads(to_json(recipe.kwargs)), "sha256": self.sha256}

    def provenance(self) -> dict[str, Any]:
        """What the new adapter's meta says of it."""
        meta = self.adapter.meta
        facts = {"folder": self.folder, "method": self.adapter.recipe.name, "sha256": self.sha256}
        return facts | {k: meta[k] for k in HISTORY if k in meta}

    def settled(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the adapter's method and parameters. Raises BadParameter where it asks for others,
        Incompatible for a method that only ever begins afresh."""
        name, own = self.adapter.recipe.name, self.adapter.recipe.kwargs
        if "method" in config.model_fields_set and config.method != name:
            raise BadParameter(
                f"init_adapter {self.folder} was made by method={name}, and method={config.method} was given; "
                f"leave it out to go on with {name}"
            )
        known = {key: parameter.default for key, parameter in describe(name).parameters.items()} | own
        method = get_method(name, **own)
        if any(getattr(spec, "fresh", False) for spec in method.controllers):
            raise Incompatible(
                f"init_adapter {self.folder}: {name} works on ranks that it made itself in the same run, and cannot go on from a finished "
                f"adapter; `lorakit mix {self.folder} --weights 1 --out FOLDER` writes it as a plain LoRA, which can be trained on"
            )
        form = _form(method)
        for key, value in config.method_args.items():
            if key != DROPOUT and _form(get_method(name, **(own | {key: value}))) != form:
                there, given = (shorten(repr(one), 80) for one in (known[key], value))
                raise BadParameter(f"init_adapter {self.folder} was made with {key}={there}, and {key}={given} was given; leave it out")
        template = config.chat_template or self.adapter.meta.get("chat_template")
        return config.model_copy(update={"method": name, "method_args": own | config.method_args, "chat_template": template})

    def lacks(self, model: nn.Module) -> tuple[str, ...]:
        """The modules of a classifier's head that the adapter does not bring."""
        whole = self.adapter.unfrozen()
        return tuple(name for name in head_of(model) if not any(key.startswith(f"{name}.") for key in whole))

    def attached(self, model: nn.Module, method: Method, *, seed: int) -> Adapted:
        """The adapter on its base, trained by this method. Raises AdapterMismatch for another base or for tensors that do not fit."""
        adapted = Adapted(model, seed=seed)
        self._check_base(adapted.fingerprint)
        assert method.recipe is not None
        heads = [(name, model.get_submodule(name)) for name in head_of(model)]
        fresh = {f"{UNFROZEN}{name}.{key}": p.detach() for name, head in heads for key, p in head.named_parameters()}
        tensors = {**fresh, **self.adapter.tensors}  # a head of its own comes before the fresh one
        return adapted.add("default", Adapter(method.recipe, self.adapter.sites, tensors, self.adapter.meta))

    def _check_base(self, here: Fingerprint) -> None:
        recorded = self.adapter.meta.get("base")
        if recorded and (made_for := Fingerprint(**recorded)).matches(here) is False:
            named = self.adapter.meta.get("model")
            raise AdapterMismatch(
                f"init_adapter {self.folder} was trained on {made_for}, and this model is {here}; "
                f"train on the same base{f' (model={named})' if named else ''}"
            )


def _form(method: Method) -> list[Any]:
    return [getattr(method, part) for part in FORM]


def beginning(config: TrainConfig, model: nn.Module, labels: Sequence[Any]) -> Beginning | None:
    """What `init_adapter` names, if anything. Raises CheckpointError, and AdapterMismatch for an adapter that predicts other classes."""
    if config.init_adapter is None:
        return None
    found = Beginning(config.init_adapter, load_adapter(config.init_adapter, model=model))
    theirs = found.adapter.meta.get("labels") or None
    if theirs is not None and theirs != list(labels):
        what = f"the classes {list(labels)}" if labels else "texts"
        raise AdapterMismatch(f"init_adapter {found.folder} predicts the classes {theirs}, and the data holds {what}")
    return found
