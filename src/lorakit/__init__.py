"""lorakit: one toolkit for everything people do with low-rank adapters."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """The names that need Transformers, which `import lorakit` leaves alone."""
    if name in ("AdapterTrainerMixin", "adapter_trainer"):
        from lorakit.train import outside

        return getattr(outside, name)
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
