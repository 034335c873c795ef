"""lorakit: one toolkit for everything people do with low-rank adapters.

A name is imported when it is first used, so that what needs no tensors (`lorakit --help`) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter
    from lorakit.core.attach import Adapted, attach, load
    from lorakit.core.delta import Delta, Factors
    from lorakit.core.errors import (
        AdapterMismatch,
        BadParameter,
        CheckpointError,
        DataError,
        Incompatible,
        LorakitError,
        MissingExtra,
        NoSuchMethod,
        NoSuchSite,
        NotExportable,
        NotMergeable,
    )
    from lorakit.core.method import Method, describe, get_method, list_methods, method
    from lorakit.core.site import Site, select
    from lorakit.parts.bases.quantize import quantize
    from lorakit.train.outside import AdapterTrainerMixin, adapter_trainer

__version__ = "0.1.0"
__all__ = [
    "Adapted",
    "Adapter",
    "AdapterMismatch",
    "AdapterTrainerMixin",
    "BadParameter",
    "CheckpointError",
    "DataError",
    "Delta",
    "Factors",
    "Incompatible",
    "LorakitError",
    "Method",
    "MissingExtra",
    "NoSuchMethod",
    "NoSuchSite",
    "NotExportable",
    "NotMergeable",
    "Site",
    "adapter_trainer",
    "attach",
    "describe",
    "get_method",
    "list_methods",
    "load",
    "method",
    "quantize",
    "select",
]
_HOMES = {
    "core.adapter": ("Adapter",),
    "core.attach": ("Adapted", "attach", "load"),
    "core.delta": ("Delta", "Factors"),
    "core.method": ("Method", "describe", "get_method", "list_methods", "method"),
    "core.site": ("Site", "select"),
    "parts.bases.quantize": ("quantize",),
    "train.outside": ("AdapterTrainerMixin", "adapter_trainer"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    return getattr(import_module(f"lorakit.{_HOME.get(name, 'core.errors')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
