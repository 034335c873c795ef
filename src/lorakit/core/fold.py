"""Changes of weights written into a model for good, without an adapter between."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.base import added, base_of, expand
from lorakit.core.errors import Incompatible
from lorakit.core.layer import Slot
from lorakit.core.prepare import tied_modules
from lorakit.core.site import Site, check_sites


@torch.no_grad()
def fold(model: nn.Module, sites: Sequence[Site], changes: Iterable[tuple[Site, Tensor]]) -> nn.Module:
    """W + change, computed at least in fp32 and stored as W is, at `sites` in the order of `changes`: [d_out, d_in], of a stack of experts
    [E, d_out, d_in]. A packed weight becomes dense; a tied one is untied first, and `config.tie_word_embeddings` set to False.

    Raises Incompatible for a model with adapters on it, AdapterMismatch for one that lacks a site, both before anything is written.
    """
    check_bare(model)
    check_sites(sites, model)
    tied = tied_modules(model)
    for site, change in changes:
        base = base_of(model.get_submodule(site.module), site.attribute)
        change = change.to(base.device, torch.promote_types(base.dtype, torch.float32))
        if site.rows is not None:
            rows = torch.cat([torch.arange(r.start, r.stop) for r in site.rows]).to(base.device)
            change = change.new_zeros(*change.shape[:-2], *base.shape).index_copy(-2, rows, change)
        base.open_()
        base.assign_(added(base, change))
        base.forget_()
        config = getattr(model, "config", None)
        if base.module in tied and config is not None:
            config.tie_word_embeddings = False
    return expand(model)


def check_bare(model: nn.Module) -> None:
    """Raise Incompatible for a model with adapters on it."""
    if any(isinstance(module, Slot) for module in model.modules()):
        raise Incompatible("this model has adapters on it; detach them first")
