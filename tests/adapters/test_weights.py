"""Reading safetensors: every byte once, into memory of its own; a file that does not hold what it announces is refused unread."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lorakit.adapters import weights
from lorakit.adapters.weights import pack, read, unpack
from lorakit.core.errors import CheckpointError

TENSORS = {
    "matrix": torch.randn(16, 64),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(4, 0),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "index": torch.arange(6),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "mask": torch.tensor([True, False]),
}


def written(path: Path, header: object, data: bytes = bytes(32)) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (8,), offsets: object = (0, 32)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in wanted.items())


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "x", {"format": "pt"})
    assert same(read(tmp_path / "x"), TENSORS)
    assert same(unpack((tmp_path / "x").read_bytes(), tmp_path / "x"), TENSORS)
    assert same(unpack(pack(TENSORS), tmp_path / "x"), TENSORS)
    safetensors.torch.save_file({}, tmp_path / "none")
    assert read(tmp_path / "none") == {}


def test_each_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    """So that one may be trained in place, and dropped, without the others."""
    safetensors.torch.save_file(TENSORS, tmp_path / "x")
    found = read(tmp_path / "x")
    storages = [t.untyped_storage() for t in found.values() if t.numel()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.values())


def test_the_file_is_read_once_and_never_whole(tmp_path: Path) -> None:
    """Python's own memory holds no copy of the bytes."""
    safetensors.torch.save_file({"a": torch.randn(512, 1024), "b": torch.randn(512, 1024)}, tmp_path / "x")
    tracemalloc.start()
    try:
        read(tmp_path / "x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**19 < (tmp_path / "x").stat().st_size / 4


@pytest.mark.parametrize("how", ["overwritten", "cut", "deleted", "replaced"])
def test_what_happens_to_the_file_later_changes_nothing(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.torch.save_file(TENSORS, path)
    found, size = read(path), path.stat().st_size
    if how == "overwritten":
        with path.open("r+b") as file:
            file.write(b"\xff" * size)
    elif how == "cut":
        os.truncate(path, 8)
    elif how == "deleted":
        path.unlink()
    else:
        safetensors.torch.save_file({k: torch.zeros_like(v) for k, v in TENSORS.items()}, tmp_path / "y")
        (tmp_path / "y").replace(path)
    assert same(found, TENSORS)


HOSTILE = {
    "an unknown dtype": ({"x": entry("F8_E4M3", [32])}, "x has dtype 'F8_E4M3'; expected one of F64, F32"),
    "a dtype of a list": ({"x": entry(["F32"])}, "unhashable"),
    "too few bytes for the shape": ({"x": entry(shape=[4])}, "x lies at bytes 0 to 32; expected 0 to 16"),
    "too many": ({"x": entry(shape=[2**30], offsets=[0, 2**32])}, "have 4294967296 bytes; the file has 32"),
    "a negative side": ({"x": entry(shape=[-2, -4])}, "x has no shape of a tensor"),
    "a side that is no integer": ({"x": entry(shape=[8.0])}, "x has no shape of a tensor"),
    "sides without end": ({"x": entry(shape=[1] * 1000 + [8])}, "x has no shape of a tensor"),
    "a huge empty side": ({"x": entry(shape=[2**62, 0], offsets=[0, 0])}, "x has no shape of a tensor"),
    "an overlap": ({"x": entry(), "y": entry(shape=[4], offsets=[16, 32])}, "y lies at bytes 16 to 32; expected 32 to 48"),
    "a gap": ({"x": entry(shape=[4], offsets=[0, 16]), "y": entry(shape=[2], offsets=[24, 32])}, "y lies at bytes 24 to 32; expected 16"),
    "bytes of none": ({"x": entry(shape=[4], offsets=[0, 16])}, "its tensors have 16 bytes; the file has 32"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [8]}}, "data_offsets"),
    "three offsets": ({"x": entry(offsets=[0, 16, 32])}, "damaged or cut off"),
    "a tensor of text": ({"x": "F32"}, "damaged or cut off"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_header_that_does_not_hold_is_refused_before_anything_is_made(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(place: object, file: object) -> Tensor:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(weights, "_filled", made)
    header, message = HOSTILE[what]
    with pytest.raises(CheckpointError, match=f"x is damaged or cut off: .*{message}" if "damaged" not in message else message):
        read(written(tmp_path / "x", header))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    data = pack(TENSORS)
    for lost in (1, 100):
        with pytest.raises(CheckpointError, match="damaged or cut off: it ends within"):
            weights._tensors(weights.io.BytesIO(data[:-lost]), len(data), tmp_path)


# ------------------------------------------------------------------------------------------------------------- as it is used
def test_a_tensor_is_read_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    made = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int16), "e": torch.empty(0, 4)}
    path.write_bytes(weights.pack(made))
    filled: list[str] = []
    original = weights._filled
    monkeypatch.setattr(weights, "_filled", lambda place, file: filled.append(place.name) or original(place, file))
    found = weights.OnDisk(path)
    assert (sorted(found), len(found), filled) == (["a", "b", "e"], 3, [])
    assert torch.equal(found["b"], made["b"])
    assert filled == ["b"]
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in made.items())
    with pytest.raises(KeyError):
        found["c"]


def test_a_file_that_is_another_one_now_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(weights.pack({"a": torch.zeros(3)}))
    found = weights.OnDisk(path)
    other = tmp_path / "b.safetensors"
    other.write_bytes(weights.pack({"a": torch.ones(3)}))
    other.replace(path)
    with pytest.raises(CheckpointError, match="was changed while it was in use"):
        found["a"]


def test_what_is_no_safetensors_file_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x80\x02junk" * 10)
    with pytest.raises(CheckpointError, match="is a pickle"):
        weights.OnDisk(path)
