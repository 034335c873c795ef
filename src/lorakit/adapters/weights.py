"""Tensors as safetensors bytes, and back. Nothing else is ever opened: a pickle can run code when it is read."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lorakit.core.errors import CheckpointError

HEADER_LIMIT = 64 * 2**20
"""Bytes of a safetensors header: some 400 thousand tensors."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """One file's bytes; equal tensors give equal bytes, in whatever order they come."""
    return safetensors.torch.save({name: _owned(t) for name, t in tensors.items()}, metadata={"format": "pt"})


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and sharing its storage with no other tensor: safetensors stores no aliases."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def unpack(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in a file's bytes. `path` is for the message. Raises CheckpointError for a pickle, garbage or a cut-off file."""
    header = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or not 0 < header <= min(HEADER_LIMIT, len(data) - 8):
        if data.startswith(PICKLE_STARTS):
            raise CheckpointError(refusal(path))
        raise CheckpointError(f"{path} is not a whole safetensors file: its {len(data)} bytes do not hold the header they announce")
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {str(error).splitlines()[0]}") from error


def refusal(path: Path) -> str:
    """Why a pickle is not read."""
    return (
        f"{path} is a pickle, which can run code when it is opened: convert it to safetensors with the tool that wrote it "
        "(PEFT: save_pretrained of a current version), then load that folder"
    )


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of at most fp32, for formats that know no fp64."""
    return {name: t.to(torch.float32) if t.dtype == torch.float64 else t for name, t in tensors.items()}
