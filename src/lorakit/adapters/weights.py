"""Tensors as safetensors bytes, and back. Nothing else is ever opened: a pickle can run code when it is read."""

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from lorakit.core.errors import CheckpointError

T = TypeVar("T")

HEADER_LIMIT = 64 * 2**20
"""Bytes of a safetensors header: some 400 thousand tensors."""

SIDE_LIMIT = 2**40
DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """One file's bytes; equal tensors give equal bytes, in whatever order they come."""
    return safetensors.torch.save({name: _owned(t) for name, t in tensors.items()}, metadata={"format": "pt"})


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and sharing its storage with no other tensor: safetensors stores no aliases."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def unpack(data: bytes, path: Path) -> dict[str, Tensor]:
    """`read`, of a file's bytes. `path` is for the message."""
    return _tensors(io.BytesIO(data), len(data), path)


def read(path: Path, *, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, Tensor]:
    """The tensors in a file. Raises CheckpointError for a pickle, garbage or a cut-off file. `dtypes`: kinds of number that it may hold.

    Each is read into memory of its own: its bytes are copied once, nothing keeps another's alive, and whatever happens to the file later
    changes none of them (a mapping would show what is written over it, and fault where it is cut).
    """
    with path.open("rb") as file:
        return _tensors(file, path.stat().st_size, path, dtypes)


class OnDisk(Mapping[str, Tensor]):
    """The tensors in a file, each read when it is asked for, and never kept. Raises what `read` does, and CheckpointError where the file is
    not the one any more that it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._known = _identity(file)
            places, self._start = _header(file, path.stat().st_size, path)
        self._places = {place.name: place for place in places}

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        with self.path.open("rb") as file:
            if _identity(file) != self._known:
                raise CheckpointError(f"{self.path} was changed while it was in use")
            file.seek(self._start + place.start)
            return _read(lambda: _filled(place, file), self.path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _identity(file: io.BufferedReader) -> tuple[int, ...]:
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _tensors(file: io.BufferedIOBase, size: int, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, Tensor]:
    places, _ = _header(file, size, path, dtypes)
    return _read(lambda: {place.name: _filled(place, file) for place in places}, path)


def _header(file: io.BufferedIOBase, size: int, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> tuple[list["_Place"], int]:
    """(the tensors in the order of their bytes, where these begin)."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    header = file.read(length) if 0 < length <= min(HEADER_LIMIT, size - 8) else b""
    if not header.startswith(b"{"):
        if start.startswith(PICKLE_STARTS):
            raise CheckpointError(refusal(path))
        raise CheckpointError(f"{path} is not a whole safetensors file: its {size} bytes do not hold the header they announce")
    return _read(lambda: _places(json.loads(header), size - 8 - length, dtypes), path), 8 + length


def _read(work: Callable[[], T], path: Path) -> T:
    try:
        return work()
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or cut off: {reason}") from error


class _Place(NamedTuple):
    """One tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: list[int]
    start: int
    """Of its bytes, behind the header."""
    nbytes: int


def _places(header: dict[str, Any], size: int, dtypes: Mapping[str, torch.dtype]) -> list[_Place]:
    """The tensors in the order of their bytes. Raises ValueError unless these fill the rest of the file without a gap or an overlap."""
    found, end = [], 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda pair: pair[1]["data_offsets"]):
        dtype, shape, (start, stop) = dtypes.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name} has dtype {entry['dtype']!r}; expected one of {', '.join(dtypes)}")
        if len(shape) > DIMENSIONS or not all(type(side) is int and 0 <= side <= SIDE_LIMIT for side in shape):
            raise ValueError(f"{name} has no shape of a tensor")
        nbytes = math.prod(shape) * dtype.itemsize
        if (start, stop) != (end, end + nbytes):
            raise ValueError(f"{name} lies at bytes {start} to {stop}; expected {end} to {end + nbytes}")
        found.append(_Place(name, dtype, shape, start, nbytes))
        end += nbytes
    if end != size:
        raise ValueError(f"its tensors have {end} bytes; the file has {size} for them")
    return found


def _filled(place: _Place, file: io.BufferedIOBase) -> Tensor:
    data = torch.empty(place.nbytes, dtype=torch.uint8)
    if file.readinto(data.numpy().data) != place.nbytes:
        raise ValueError(f"it ends within {place.name}")
    return data.view(place.dtype).view(place.shape)


def refusal(path: Path) -> str:
    """Why a pickle is not read."""
    return (
        f"{path} is a pickle, which can run code when it is opened: convert it to safetensors with the tool that wrote it "
        "(PEFT: save_pretrained of a current version), then load that folder"
    )


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of at most fp32, for formats that know no fp64."""
    return {name: t.to(torch.float32) if t.dtype == torch.float64 else t for name, t in tensors.items()}
