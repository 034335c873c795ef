"""An adapter at rest: a recipe, its sites, its tensors, and what it should know about itself. No module, no model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.core import random
from lorakit.core.combine import AddSpec
from lorakit.core.delta import Delta, Factors
from lorakit.core.errors import AdapterMismatch, NotExportable, did_you_mean
from lorakit.core.method import Method, Recipe, get_method
from lorakit.core.shared import Shared, take_shapes
from lorakit.core.site import ROOT, Site

UNFROZEN = "unfrozen."
POOL = "pool"


@dataclass(frozen=True)
class Adapter:
    """`tensors` are keyed `<site>.<tensor>` ("model.layers.0.self_attn.q_proj.A"), `unfrozen.<parameter>` for whole trained parameters, and
    `lora_shared.<child>.<tensor>` for what the sites share.

    `meta` holds the base's fingerprint, chat template, data hash and metrics: JSON values only.
    """

    recipe: Recipe
    sites: tuple[Site, ...]
    tensors: Mapping[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def method(self) -> Method:
        """The method that the recipe names."""
        return get_method(self.recipe.name, **self.recipe.kwargs)

    def of(self, site: Site) -> dict[str, Tensor]:
        """One site's tensors, by their short names."""
        prefix = site.name + "."
        return {k[len(prefix) :]: self.tensors[k] for k in self.tensors if k.startswith(prefix) and "." not in k[len(prefix) :]}

    def shapes(self) -> dict[str, dict[str, torch.Size]]:
        """Of every site's tensors, by its name and theirs."""
        found: dict[str, dict[str, torch.Size]] = {site.name: {} for site in self.sites}
        for key, tensor in self.tensors.items():
            name, _, short = key.rpartition(".")
            if name in found:
                found[name][short] = tensor.shape
        return found

    def unfrozen(self) -> dict[str, Tensor]:
        """Whole trained parameters, by their path in the model."""
        return {k[len(UNFROZEN) :]: v for k, v in self.tensors.items() if k.startswith(UNFROZEN)}

    def shared(self, child: str) -> dict[str, Tensor]:
        """The tensors of one shared child ("pool", or a patch's name), by their short names."""
        prefix = f"{ROOT}.{child}."
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def build(self, device: str = "cpu") -> tuple[Shared | None, dict[str, Delta]]:
        """The pool and each site's delta, with the shapes of this adapter's tensors but not filled."""
        method, at = self.method(), torch.device(device)
        if method.delta is None:
            return None, {}
        rng = random.generator(0, POOL)
        pool = method.delta.pool(self.sites, every=self.sites, rng=rng, dtype=torch.float32, device=at)
        if pool is not None:
            take_shapes(pool.fit, _shapes(self.shared(POOL)), f"{ROOT}.{POOL}")
        deltas = {s.name: method.delta.build(s, pool=pool, dtype=torch.float32, device=at) for s in self.sites}
        for name, shapes in self.shapes().items():
            take_shapes(deltas[name].fit, shapes, name)
        return pool, deltas

    def deltas(self) -> dict[str, Delta]:
        """A delta module per site, on the CPU, holding this adapter's tensors."""
        if self.method().delta is None:
            return {}
        at = self.opened()
        return {site.name: at(site) for site in self.sites}

    def opened(self) -> Callable[[Site], Delta]:
        """Makes one site's delta at a time, reading no other site's tensors."""
        spec, cpu = self.method().delta, torch.device("cpu")
        if spec is None:
            raise NotExportable(f"{self.recipe.name} has no delta: it changes no weight by one")
        pool = spec.pool(self.sites, every=self.sites, rng=random.generator(0, POOL), dtype=torch.float32, device=cpu)
        if pool is not None:
            shared = self.shared(POOL)
            take_shapes(pool.fit, _shapes(shared), f"{ROOT}.{POOL}")
            pool.load_state_dict(shared)
            pool.eval().requires_grad_(False)

        def at(site: Site) -> Delta:
            delta, tensors = spec.build(site, pool=pool, dtype=torch.float32, device=cpu), self.of(site)
            take_shapes(delta.fit, _shapes(tensors), site.name)
            delta.load_state_dict({name: tensors[name] for name in delta.state_dict() if name in tensors})
            return delta.eval().requires_grad_(False)

        return at

    def factors(self, *, stacks: bool = False) -> dict[str, Factors]:
        """(A, B, s) per site. Raises NotExportable with the sites and the reason when the update is not s·B·A, and where the factors are
        stacks, one pair for each expert, unless the caller knows `stacks`."""
        self.check_factors(stacks=stacks)
        found = {name: delta.factors() for name, delta in self.deltas().items()}
        without = [name for name, f in found.items() if f is None]
        if without:
            raise NotExportable(f"{self.recipe.name} has no factors at {len(without)} sites ({without[0]}, …)")
        return {name: f for name, f in found.items() if f is not None}

    def check_factors(self, *, stacks: bool = False) -> None:
        """Raise NotExportable where the method alone says that the update is not s·B·A."""
        method = self.method()
        if method.beyond is not None:
            raise NotExportable(f"{self.recipe.name} is more than a change of weights: {method.beyond}")
        if not isinstance(method.combine, AddSpec):
            names = [s.name for s in self.sites]
            what = "rescales W itself" if method.combine.full_rank() else "changes more than W"
            raise NotExportable(f"{self.recipe.name} {what} at {len(names)} sites ({names[0]}, …): its update is not s·B·A")
        stacked = [site.name for site in self.sites if site.experts is not None]
        if stacked and not stacks:
            raise NotExportable(f"{len(stacked)} sites are stacks of experts ({stacked[0]}, …): there is no single s·B·A for one of them")

    def check(self, expected: Mapping[str, Tensor], what: str) -> None:
        """Raise AdapterMismatch unless the tensors are exactly those expected, in shape and kind of number, and finite."""
        missing, extra = sorted(set(expected) - set(self.tensors)), sorted(set(self.tensors) - set(expected))
        if missing or extra:
            parts = [f"{len(names)} {kind} ({names[0]}, …)" for kind, names in (("missing", missing), ("not expected", extra)) if names]
            hint = did_you_mean(extra[0], missing) if missing and extra else ""
            raise AdapterMismatch(f"the adapter's tensors do not fit {what}: {' and '.join(parts)}. {hint}".rstrip())
        for name, wanted in expected.items():
            tensor = self.tensors[name]
            if tensor.shape != wanted.shape:
                raise AdapterMismatch(f"tensor {name} has shape {tuple(tensor.shape)}; {what} needs {tuple(wanted.shape)}")
            floats = wanted.is_floating_point()
            if not tensor.is_floating_point() if floats else tensor.dtype != wanted.dtype:
                raise AdapterMismatch(
                    f"tensor {name} holds {tensor.dtype}; expected {'floating-point numbers' if floats else wanted.dtype}"
                )
            if floats and not _finite(tensor):
                raise AdapterMismatch(f"tensor {name} holds NaN or infinite values; the adapter is damaged or its training diverged")


def _finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The sum says so eight times faster; it may itself overflow, then each entry is looked at."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
