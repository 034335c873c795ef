"""Layers taken off a finished adapter (AdapterDrop, arXiv:2010.11918): a module that is not there costs no time.

An adapter trained with `drop_random` keeps its quality; any other loses what its first layers learned.
"""

import dataclasses

from lorakit.core.adapter import Adapter
from lorakit.core.errors import BadParameter


def without_first(adapter: Adapter, n: int) -> Adapter:
    """The adapter without the sites of its first `n` layers. What the sites share, and sites outside the layers, stay."""
    gone = [site for site in adapter.sites if site.layer is not None and site.layer < n]
    kept = tuple(site for site in adapter.sites if site not in gone)
    if n < 0 or not kept:
        layers = 1 + max((site.layer for site in adapter.sites if site.layer is not None), default=-1)
        raise BadParameter(f"n={n} leaves nothing of an adapter with {layers} layers; expected 0 <= n < {layers}")
    names = tuple(f"{site.name}." for site in gone)
    return dataclasses.replace(adapter, sites=kept, tensors={k: v for k, v in adapter.tensors.items() if not k.startswith(names)})
