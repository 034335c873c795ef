"""Tensors of few different values in few bytes, without loss: which entries are not zero, by Golomb's code, and what those are.

    sparse_index     JSON, deflated: of every tensor its name, dtype and shape, and how it is coded
    sparse_stream    the tensors one after another: the size of the entries, once; then bits: places | signs, up to a whole byte

Ternary tensors, c · {−1, 0, +1}, take little more than their entropy, H = −(1−k) log₂(1−k) − k log₂(k/2) bits an entry with a share k that
is not zero: at most 0.7 % more for k from 0.005 to 0.3, 2.2 % up to 1/2 (golomb.py). Where more than half are not zero, the places of the
zeros are coded. Where entries differ in size, their own bytes take the place of the signs: so any tensor can be coded, in 1/256 bit an
entry more than it has.

What is read is hostile until it fits: both tensors are sealed by a checksum, every number in the index is bounded by the bytes that
are there before memory is asked for (a byte stands for 2048 entries at most), and anything odd is a CheckpointError.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lorakit.adapters import golomb
from lorakit.adapters.weights import DIMENSIONS, DTYPES, SIDE_LIMIT
from lorakit.core.errors import CheckpointError

INDEX, STREAM = "sparse_index", "sparse_stream"
"""An adapter's own tensors have a dot in their names."""
VERSION = 1
INDEX_LIMIT = 16 * 2**20
"""Bytes of an index: some 100 thousand tensors."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PATTERNS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
"""By bytes of a number: what its bits are looked at as; the uppermost is the sign."""

Patterns = NDArray[np.unsignedinteger[Any]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Entry(_Strict):
    """One tensor of the stream."""

    name: str
    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: list[int] = Field(max_length=DIMENSIONS)
    nbytes: int = Field(ge=0)
    coded: Literal["kept", "zeros"]
    """Whose places the bits say."""
    count: int = Field(ge=0)
    """How many those are."""
    m: int = Field(ge=1, le=golomb.LARGEST)
    sizes: Literal["one", "own"]
    """Of what is not zero: all of one size, and signs; or each in its own bytes."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    @property
    def kept(self) -> int:
        """Entries that are not zero."""
        return self.count if self.coded == "kept" else math.prod(self.shape) - self.count

    @pydantic.model_validator(mode="after")
    def _bounded(self) -> "Entry":
        size = math.prod(self.shape) if all(0 <= side <= SIDE_LIMIT for side in self.shape) else -1
        if not 0 <= self.count <= size or size >= 8 * self.m * self.nbytes:
            raise ValueError(f"{self.name} has the shape {self.shape}, which {self.nbytes} bytes cannot hold")
        return self


class _Head(BaseModel):
    version: int


class _Index(_Strict):
    version: int
    crc32: int
    """Of the stream."""
    tensors: list[Entry]


def encode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The index and the stream of these tensors; equal tensors give equal bytes, in whatever order they come."""
    parts = [_encoded(name, tensors[name]) for name in sorted(tensors)]
    stream = b"".join(data for _, data in parts)
    index = _Index(version=VERSION, crc32=zlib.crc32(stream), tensors=[entry for entry, _ in parts]).model_dump_json().encode()
    if len(index) > INDEX_LIMIT:
        raise CheckpointError(f"the index of {len(parts)} tensors has {len(index)} bytes; at most {INDEX_LIMIT} are read")
    return {INDEX: _tensor(zlib.compress(index, 9)), STREAM: _tensor(stream)}


def decode(tensors: Mapping[str, Tensor], path: Path, *, lazily: bool = False) -> Mapping[str, Tensor]:
    """What `encode` was given, bit by bit; other tensors as they are. Raises CheckpointError; `path` is for its message."""
    if not tensors.keys() & {INDEX, STREAM}:
        return tensors
    coded = Coded(tensors, path)
    return coded if lazily else dict(coded)


class Coded(Mapping[str, Tensor]):
    """The tensors of an index and a stream, each decoded when it is asked for, and never kept; the stream is."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.path = path
        with _reported(path):
            found = list(_entries(dict(tensors)))
        self.entries = {entry.name: entry for entry, _ in found}
        self._data = {entry.name: data for entry, data in found}

    def __getitem__(self, name: str) -> Tensor:
        entry, data = self.entries[name], self._data[name]
        with _reported(self.path):
            return _decoded(entry, data)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path} is damaged or cut off: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
    except (ValueError, RuntimeError, OverflowError, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {str(error).partition(chr(10))[0]}") from error


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))


def _entries(tensors: Mapping[str, Tensor]) -> Iterator[tuple[Entry, memoryview]]:
    """Every entry of the index with its bytes. Raises ValueError."""
    wrong = [f"{name} of {t.dtype} {list(t.shape)}" for name, t in tensors.items() if t.dtype != torch.uint8 or t.ndim != 1]
    if tensors.keys() != {INDEX, STREAM} or wrong:
        raise ValueError(f"expected {INDEX} and {STREAM}, two rows of bytes; found {', '.join(wrong or sorted(tensors))}")
    index = _index(tensors[INDEX].numpy().tobytes())
    stream = tensors[STREAM].numpy().data
    if zlib.crc32(stream) != index.crc32:
        raise ValueError("the stream's checksum is not the one in its index")
    total = sum(entry.nbytes for entry in index.tensors)
    if total != len(stream) or len({entry.name for entry in index.tensors}) != len(index.tensors):
        raise ValueError(f"the index has names twice, or its tensors' {total} bytes are not the {len(stream)} of the stream")
    end = 0
    for entry in index.tensors:
        start, end = end, end + entry.nbytes
        yield entry, stream[start:end]


def _index(data: bytes) -> _Index:
    inflater = zlib.decompressobj()
    text = inflater.decompress(data, INDEX_LIMIT)
    if not inflater.eof or inflater.unused_data:
        raise ValueError(f"the index is not whole, or longer than {INDEX_LIMIT} bytes")
    version = _Head.model_validate_json(text).version
    if version != VERSION:
        raise ValueError(f"its code has version {version}; this lorakit reads {VERSION}: upgrade lorakit")
    return _Index.model_validate_json(text)


def _encoded(name: str, tensor: Tensor) -> tuple[Entry, bytes]:
    row: Patterns = tensor.detach().cpu().reshape(-1).view(PATTERNS[tensor.itemsize]).numpy()
    places = np.flatnonzero(row)
    kept, few = row[places], 2 * len(places) <= len(row)
    coded = places if few else np.flatnonzero(row == 0)
    m = golomb.parameter(len(coded) / max(1, len(row)))
    bits = golomb.encode(coded, len(row), m)
    sign = _sign(row.dtype)
    sizes = kept & ~sign
    one = len(kept) > 0 and bool((sizes == sizes[0]).all())
    if one:
        bits = np.concatenate([bits, (kept >= sign).astype(np.uint8)])
    data = (sizes[:1] if one else kept).tobytes() + np.packbits(bits).tobytes()
    how: dict[str, Any] = {"coded": "kept" if few else "zeros", "count": len(coded), "m": m, "sizes": "one" if one else "own"}
    how |= {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
    return Entry(name=name, nbytes=len(data), **how), data


def _decoded(entry: Entry, data: memoryview) -> Tensor:
    """Raises ValueError unless the bytes are exactly those of such a tensor."""
    size, own = math.prod(entry.shape), entry.itemsize * (1 if entry.sizes == "one" else entry.kept)
    if own > len(data):
        raise ValueError(f"{entry.name} ends within the sizes of its entries")
    sizes: Patterns = np.frombuffer(data[:own], f"<u{entry.itemsize}")
    bits = np.unpackbits(np.frombuffer(data[own:], np.uint8))
    places, used = golomb.decode(bits, entry.count, size, entry.m)
    taken = used + (entry.kept if entry.sizes == "one" else 0)
    if not 0 <= len(bits) - taken < 8 or bits[taken:].any():
        raise ValueError(f"{entry.name} takes {taken} of {len(bits)} bits")
    found = torch.zeros(size, dtype=PATTERNS[entry.itemsize])
    row: Patterns = found.numpy()
    at = places if entry.coded == "kept" else _others(places, size)
    row[at] = sizes | bits[used:taken] * _sign(row.dtype) if entry.sizes == "one" else sizes
    return found.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _others(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The places of 0 … size that are not among these."""
    rest = np.ones(size, bool)
    rest[places] = False
    return np.flatnonzero(rest)


def _sign(dtype: np.dtype[Any]) -> Any:
    """The uppermost bit."""
    return dtype.type(1 << 8 * dtype.itemsize - 1)
