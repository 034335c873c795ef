"""The updates of an adapter, made site by site when they are asked for, and the frozen weights under them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters.diagnose.update import Update, factored, whole
from lorakit.adapters.pair import change, seen
from lorakit.core.adapter import Adapter
from lorakit.core.combine import AddSpec
from lorakit.core.delta import Delta
from lorakit.core.errors import AdapterMismatch, BadParameter, NotExportable
from lorakit.core.site import Site, check_sites


@dataclass(frozen=True)
class Updates:
    """Of one adapter. `of` makes it."""

    adapter: Adapter
    opened: Callable[[Site], Delta]
    model: nn.Module | None

    @classmethod
    def of(cls, adapter: Adapter, model: nn.Module | None = None) -> "Updates":
        """Raises NotExportable for an adapter that is no change of weights, or whose change is known with the model only; AdapterMismatch
        for a model that lacks its sites."""
        method, name = adapter.method(), adapter.recipe.name
        if method.beyond is not None:
            raise NotExportable(f"{name} is more than a change of weights: {method.beyond}; only changes of weights can be diagnosed")
        plain = isinstance(method.combine, AddSpec)
        if not adapter.sites or not (plain or method.combine.full_rank()):
            raise NotExportable(f"{name} changes no weight of a site; only changes of weights can be diagnosed")
        if not plain and model is None:
            raise NotExportable(f"{name} rescales W itself: its change of W is known with the base only; give the model (--model)")
        if model is not None:
            check_sites(adapter.sites, model)
        return cls(adapter, adapter.opened(), model)

    def at(self, site: Site) -> list[Update]:
        """One site's update, of a stack one for each expert. Raises AdapterMismatch where it is not finite."""
        delta = self.opened(site)
        plain = isinstance(self.adapter.method().combine, AddSpec)
        f = delta.factors() if plain else None
        found = factored(f) if f is not None else whole(change(self.adapter, site, delta, self.model))
        if not all(torch.isfinite(t).all() for u in found for t in (u.A, u.B) if t is not None):
            raise AdapterMismatch(
                f"the update of {site.name} holds NaN or infinite values; the adapter is damaged or its training diverged"
            )
        return found

    def weights(self, site: Site) -> list[Tensor]:
        """The frozen weight under a site in fp32, of a fused one the site's own rows: d_out × d_in, of a stack one for each expert."""
        if self.model is None:
            raise BadParameter("the frozen weights are needed here; give the model (--model)")
        W = seen(self.model, site, self.opened(site)).dense(torch.float32)
        return list(W.unbind()) if W.ndim == 3 else [W]


def beside(adapter: Adapter) -> list[str]:
    """What an adapter trains besides its updates, in words: diagnostics do not see it."""
    names = list(adapter.unfrozen())
    return [f"{len(names)} tensors trained whole are left out ({names[0]}, …)"] if names else []
