"""Types that hold one of our methods tensor by tensor: a short name in the type's tables is the name of our tensor."""

from abc import ABC
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.peft_type import Form, Found, Part, PeftType, whole_linear
from lorakit.core.adapter import POOL, Adapter
from lorakit.core.errors import AdapterMismatch
from lorakit.core.method import Method
from lorakit.core.site import ROOT, Site


class OwnType(PeftType[Part], ABC):
    """Whole linear weights alone; shapes are checked against the recipe, with all others."""

    def tensors(self, found: Found[Part], method: Method, sites: Sequence[Site], model: nn.Module | None) -> dict[str, Tensor]:
        out = {f"{site.name}.{name}": tensor for site in sites for name, tensor in found.modules[site.name].tensors.items()}
        return out | pooled(found.shared)


def pooled(shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the modules share as what our sites share."""
    return {f"{ROOT}.{POOL}.{name}": tensor for name, tensor in shared.items()}


def own_form(adapter: Adapter, peft_type: str, fields: dict[str, Any], shared: Collection[str] = ()) -> Form[Part] | None:
    """Every tensor as it is, with these of the pool; None where a site is a part of a weight or an embedding."""
    if not whole_linear(adapter):
        return None
    modules = {site.name: Part(site.kind, adapter.of(site)) for site in adapter.sites}
    pool = {name: tensor for name, tensor in adapter.shared(POOL).items() if name in shared}
    return Form(modules, None, peft_type, fields, pool, restorable=True)


def check_names(module: str, part: Part, *wanted: set[str], path: Path) -> Part:
    """The part itself, when its tensors are one of the sets wanted. Raises AdapterMismatch."""
    if set(part.tensors) not in wanted:
        sets = " or ".join(str(sorted(names)) for names in wanted)
        raise AdapterMismatch(f"module {module!r} has the tensors {sorted(part.tensors)}; {path} needs {sets}")
    return part
