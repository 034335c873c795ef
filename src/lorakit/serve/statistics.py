"""What regmean and fisher need of an adapter's own task, by site, kept in one safetensors file.

gram      mean of x xᵀ over the task's tokens: [d_in, d_in]
fisher    mean over the task's rows of (∂ log p(row) / ∂W)², entry by entry, at the row's own labels: [d_out, d_in], the empirical diagonal

Both are taken with the adapter on, padding aside.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters.weights import pack, read
from lorakit.core.calibrate import GRADIENTS, INPUTS, Calibration, observe
from lorakit.core.errors import BadParameter, CheckpointError, Incompatible
from lorakit.core.site import Site
from lorakit.serve.open import Opened
from lorakit.serve.score import prepared
from lorakit.train.metrics import forward_loss

KINDS = ("gram", "fisher")


def collect(
    opened: Opened, data: str, kind: str, *, whole: bool = False, limit: int | None = None, max_length: int | None = None
) -> dict[str, Tensor]:
    """The statistics of an opened adapter on the validation side of `data` (all of it with `whole`), by site name.

    `limit` counts rows. Raises BadParameter, DataError.
    """
    if kind not in KINDS:
        raise BadParameter(f"there is no statistic {kind!r}; expected {' or '.join(KINDS)}")
    if opened.adapted is None:
        raise BadParameter("statistics are those of an adapter's task: give an adapter, not a base alone")
    adapter = opened.adapted.state()
    odd = [site.name for site in adapter.sites if site.kind != "linear"]
    if odd:
        raise Incompatible(f"{kind} is known for linear layers; {len(odd)} sites are others ({odd[0]}, …)")
    side = prepared(opened, data, whole=whole, limit=limit, max_length=max_length).valid
    size = 8 if kind == "gram" else 1  # a row's gradient is squared by itself
    batches = [side.collate(side.items[i : i + size]) for i in range(0, len(side.items), size)]
    return (_gram if kind == "gram" else _fisher)(opened.model, adapter.sites, batches)


def _gram(model: nn.Module, sites: tuple[Site, ...], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    seen = observe(model, sites, frozenset({INPUTS}), Calibration(batches, forward_loss))
    return {name: s.moment / max(1, s.tokens) for name, s in seen.items() if s.moment is not None}


def _fisher(model: nn.Module, sites: tuple[Site, ...], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    sums = {site.name: torch.zeros(site.d_out, site.d_in) for site in sites}
    for batch in batches:
        n = max(1, int((batch["labels"] != -100).sum()))
        for name, seen in observe(model, sites, frozenset({GRADIENTS}), Calibration([batch], forward_loss)).items():
            assert seen.gradient is not None
            sums[name].add_((seen.gradient * n).square())
    return {name: total / max(1, len(batches)) for name, total in sums.items()}


def save_statistics(found: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write them, whole or not at all. Raises CheckpointError."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(pack(found))
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def load_statistics(path: str | Path) -> dict[str, Tensor]:
    """Read them. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there are no statistics {path}; `lorakit statistics ADAPTER --data DATA --out {path}` makes them")
    return read(path)
