"""One expert of a mixture as an ordinary LoRA: loadable, mergeable and exportable by itself."""

from lorakit.adapters.peft_type import argument
from lorakit.adapters.plain import plain_lora
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.errors import BadParameter, NotExportable


def expert(adapter: Adapter, i: int) -> Adapter:
    """The i-th of an adapter's experts, at the sites where it has a part. Raises NotExportable for an adapter that mixes none."""
    found = {name: delta.experts() for name, delta in adapter.deltas().items()}
    n = min((len(experts) for experts in found.values()), default=0)
    if n == 0:
        raise NotExportable(f"{adapter.recipe.name} mixes no experts: the adapter is one already")
    if not 0 <= i < n:
        raise BadParameter(f"there is no expert {i}: this adapter has {n}, from 0 to {n - 1}")
    parts = {name: _trimmed(experts[i]) for name, experts in found.items()}
    mine = {name: f for name, f in parts.items() if f is not None}
    if not mine:
        raise NotExportable(f"expert {i} of {n} has no part at any site")
    sites = tuple(site for site in adapter.sites if site.name in mine)
    meta = {k: v for k, v in adapter.meta.items() if k in ("base", "quantized")}
    return plain_lora(sites, mine, meta, dropout=argument(adapter, "dropout"))


def _trimmed(f: Factors) -> Factors | None:
    """Without components that are zero in both factors, which only fill up a stack of several ranks; None where none is left."""
    kept = f.A.any(dim=1) | f.B.any(dim=0)
    return Factors(f.A[kept], f.B[:, kept], f.s) if kept.any() else None
