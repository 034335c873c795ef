"""Which base an adapter was made for: the same for fp32, bf16 and quantized loads of one checkpoint.

`checkpoint`: digest of the source folder's safetensors (names, shapes, dtypes, and sampled bytes of every tensor), when the model came
from one.
`rows`: digest of sampled entries of every parameter, rounded to bf16 first, so that an fp32 and a bf16 load agree. A packed weight's sample
was taken before it was packed, so that a quantized load agrees too; None when that is not known (a checkpoint that came packed).
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.core.errors import AdapterMismatch

if TYPE_CHECKING:
    from lorakit.core.adapter import Adapter

SAMPLE = 256


@dataclass(frozen=True)
class Fingerprint:
    """Digests are the first 32 hex digits of sha256; `name` is for people only."""

    name: str
    checkpoint: str | None
    rows: str | None

    def matches(self, other: "Fingerprint") -> bool | None:
        """Whether both name the same weights; None when they share no digest to compare."""
        pairs = [(self.checkpoint, other.checkpoint), (self.rows, other.rows)]
        known = [a == b for a, b in pairs if a and b]
        return any(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} ({(self.checkpoint or self.rows or 'unknown')[:12]})"


def fingerprint(model: nn.Module) -> Fingerprint:
    """The model's fingerprint as it is now (call before anything trains)."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return Fingerprint(os.path.basename(name.rstrip("/")), _checkpoint_digest(name), _rows_digest(model))


def _rows_digest(model: nn.Module) -> str | None:
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        shape, taken = _sampled(model, name, p)
        if taken is None:
            return None
        digest.update(f"{name}{shape}".encode())
        digest.update(taken.numpy().tobytes())
    return digest.hexdigest()[:32]


def _sampled(model: nn.Module, name: str, p: Tensor) -> tuple[tuple[int, ...], Tensor | None]:
    if p.is_floating_point():
        return tuple(p.shape), None if p.is_meta else sample(p)
    origin: Callable[[nn.Module], tuple[tuple[int, ...], Tensor | None]] | None
    module = model.get_submodule(name.rpartition(".")[0])
    origin = getattr(type(module), "origin", None)
    return origin(module) if origin is not None else ((), None)


def sample(weight: Tensor) -> Tensor:
    """Bits of at most SAMPLE entries of a weight: int16, on the CPU."""
    flat = weight.detach().reshape(-1)
    stride = max(1, flat.numel() // SAMPLE)
    return flat[::stride][:SAMPLE].to("cpu", torch.bfloat16, copy=True).view(torch.int16)


def _checkpoint_digest(folder: str) -> str | None:
    files = sorted(Path(folder).glob("*.safetensors")) if folder and Path(folder).is_dir() else []
    entries = sorted(entry for file in files for entry in _tensors(file))
    if not entries:
        return None
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(entry).encode())
    return digest.hexdigest()[:32]


def _tensors(file: Path) -> list[tuple[str, str, str, str]]:
    """(name, dtype, shape, digest of sampled bytes) of every tensor of one safetensors file, without loading it."""
    out = []
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
        for name, info in header.items():
            if name == "__metadata__":
                continue
            start, stop = info["data_offsets"]
            digest = hashlib.sha256()
            for at in (start, (start + stop) // 2, max(start, stop - SAMPLE)):
                f.seek(8 + length + at)
                digest.update(f.read(min(SAMPLE, stop - at)))
            out.append((name, info["dtype"], str(info["shape"]), digest.hexdigest()))
    return out


def check_base(adapter: "Adapter", found: Fingerprint, *, force: bool) -> None:
    """Raise AdapterMismatch when the adapter was trained on other weights."""
    recorded = adapter.meta.get("base")
    if recorded and not force:
        made_for = Fingerprint(**recorded)
        if made_for.matches(found) is False:
            raise AdapterMismatch(f"the adapter was trained on {made_for}, but this model is {found}; force=True (--force) loads it anyway")
