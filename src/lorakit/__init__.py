"""lorakit: one toolkit for everything people do with low-rank adapters."""

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

__version__ = "0.1.0"
__all__ = [
    "Adapted",
    "Adapter",
    "AdapterMismatch",
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
    "attach",
    "describe",
    "get_method",
    "list_methods",
    "load",
    "method",
    "quantize",
    "select",
]
