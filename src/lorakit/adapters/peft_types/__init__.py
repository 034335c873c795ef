"""PEFT's types of adapter that lorakit reads and writes, one file each. A new type is a file and a line here."""

from collections.abc import Mapping
from typing import Any

from lorakit.adapters.peft_type import FolderType, PeftType, Table, Writer
from lorakit.adapters.peft_types.adalora import AdaLora
from lorakit.adapters.peft_types.fourierft import FourierFT
from lorakit.adapters.peft_types.lokr import Lokr
from lorakit.adapters.peft_types.lora import Lora
from lorakit.adapters.peft_types.vblora import VbLora
from lorakit.adapters.peft_types.vera import Vera
from lorakit.adapters.peft_types.xlora import XLora

TYPES: Mapping[str, PeftType[Any]] = {kind.table.name: kind for kind in (Lora(), AdaLora(), Vera(), VbLora(), FourierFT(), Lokr())}
"""By peft_type."""
NATIVE: Mapping[str, Writer] = {recipe: form for kind in TYPES.values() for recipe, form in kind.table.native.items()}
"""By recipe: PEFT's own form of a method. One that gives None leaves the adapter to the plain form."""
FOLDERS: Mapping[str, FolderType] = {kind.table.name: kind for kind in (XLora(),)}
"""By peft_type: those whose folder holds other adapters."""
FOLDER_OF: Mapping[str, str] = {"xlora": "XLORA"}
"""By recipe."""
TABLES: Mapping[str, Table] = {name: t.table for name, t in TYPES.items()} | {name: t.table for name, t in FOLDERS.items()}
