"""lorakit's own format, and the one door for loading either format.

    adapter.safetensors   every tensor under its name, as in core/adapter.py, or all of them coded (sparse.py); metadata {"format": "pt"}
    adapter.json          format version, recipe, sites, meta (see record.py)

Saving, loading and saving again gives the same bytes. A folder is replaced as a whole (see folder.py). Nothing here touches the network.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters import sparse
from lorakit.adapters.folder import locate, write_files
from lorakit.adapters.peft_config import CONFIG
from lorakit.adapters.record import read_bounded, read_record, recipe_in, record_of, to_json
from lorakit.adapters.weights import PICKLES, OnDisk, pack, read, refusal
from lorakit.core.adapter import POOL, UNFROZEN, Adapter
from lorakit.core.combine import AddSpec
from lorakit.core.errors import CheckpointError, did_you_mean
from lorakit.core.site import ROOT

RECORD = "adapter.json"
WEIGHTS = "adapter.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"


def save_adapter(adapter: Adapter, folder: str | Path, *, coded: bool = False) -> Path:
    """Write an adapter to a folder. Raises CheckpointError; a save that fails or is killed leaves the folder's last good adapter.

    `coded`: in as few bytes as sparse.py can, which pays where most values are zero (compress.py). What is read is the same, bit by bit.
    """
    if locate(folder, CONFIG) is not None:
        raise CheckpointError(f"{folder} holds an adapter in PEFT's format; save to another folder")
    tensors = sparse.encode(adapter.tensors) if coded else adapter.tensors
    return write_files(folder, {WEIGHTS: pack(tensors), RECORD: to_json(record_of(adapter))})


def load_adapter(folder: str | Path, *, model: nn.Module | None = None, lazily: bool = False) -> Adapter:
    """Read an adapter from a folder of lorakit's or PEFT's format, or from a file of kohya's or LyCORIS's; the last two need the model they
    are for.

    `lazily`: lorakit's own tensors are read each time they are asked for, and not kept (weights.py, OnDisk).

    Raises CheckpointError for files that cannot be read, AdapterMismatch for tensors that do not fit their own recipe.
    """
    own = locate(folder, RECORD) is not None
    adapter = read_adapter(folder, model=model, lazily=lazily)
    return check(adapter) if own else adapter


def read_adapter(folder: str | Path, *, model: nn.Module | None = None, lazily: bool = False) -> Adapter:
    """`load_adapter`, but for lorakit's own format without `check`: attaching checks the tensors against the deltas that take them."""
    folder = Path(folder)
    if locate(folder, RECORD) is not None:
        return _own(folder, lazily)
    if locate(folder, CONFIG) is not None:
        from lorakit.adapters.peft_read import from_peft

        return from_peft(folder, model=model)
    if is_file(folder):
        from lorakit.adapters.kohya_read import from_kohya

        return check(from_kohya(folder, model=model))
    raise CheckpointError(_nothing(folder))


def is_file(source: str | Path) -> bool:
    """Whether a source is a file by itself, of kohya's or LyCORIS's, and not a folder or a part of one."""
    path = Path(source)
    return path.is_file() and path.suffix == ".safetensors" and path.name not in (WEIGHTS, PEFT_WEIGHTS)


def check(adapter: Adapter) -> Adapter:
    """The adapter itself, when its tensors are exactly those of its recipe and sites: none missing, extra, misshaped or not finite.

    What a rescaling method keeps beside its delta depends on the base and is checked when the adapter is attached.
    """
    method = adapter.method()
    expected: dict[str, Tensor] = {}
    pool, deltas = adapter.build("meta")
    if pool is not None:
        expected |= {f"{ROOT}.{POOL}.{k}": v for k, v in pool.state_dict().items()}
    for name, shapes in adapter.shapes().items():
        if not isinstance(method.combine, AddSpec):
            expected |= {f"{name}.{k}": _floats(shape) for k, shape in shapes.items()}
        expected |= {f"{name}.{k}": v for k, v in deltas[name].state_dict().items()}
    elsewhere = (UNFROZEN, *(f"{ROOT}.{patch.name}." for patch in method.patches))
    expected |= {k: _floats(v.shape) for k, v in adapter.tensors.items() if k.startswith(elsewhere)}
    adapter.check(expected, f"its own recipe {adapter.recipe.name!r}")
    return adapter


def _floats(shape: torch.Size) -> Tensor:
    """What a tensor of a shape that is not known here should be."""
    return torch.empty(shape, device="meta")


def read_weights(path: Path | None, folder: Path, name: str) -> bytes:
    """The bytes of a folder's weights file."""
    return found_weights(path, folder, name).read_bytes()


def found_weights(path: Path | None, folder: Path, name: str) -> Path:
    """The path of a folder's weights file, which must be there."""
    if path is None:
        pickles = [p for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
        raise CheckpointError(refusal(pickles[0]) if pickles else f"{folder} has no {name}: it was not copied whole")
    return path


def _own(folder: Path, lazily: bool) -> Adapter:
    path = locate(folder, RECORD)
    assert path is not None
    record = read_record(read_bounded(path), path)
    weights = found_weights(locate(folder, WEIGHTS), folder, WEIGHTS)
    tensors = sparse.decode(OnDisk(weights) if lazily else read(weights), weights, lazily=lazily)
    return Adapter(recipe_in(record, path), tuple(s.site() for s in record.sites), tensors, record.meta)


def _nothing(folder: Path) -> str:
    """Why there is no adapter at a path."""
    if folder.suffix in PICKLES and folder.is_file():
        return refusal(folder)
    if folder.is_file():
        return f"{folder} is a file; give the folder that holds it"
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        return f"there is no folder {folder}. {did_you_mean(folder.name, beside)}".rstrip()
    pickles = [p for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if pickles:
        return refusal(pickles[0])
    inside = [p.parent.name for name in (RECORD, CONFIG) for p in sorted(folder.glob(f"*/{name}"))]
    hint = f"; there is one in {folder / inside[0]}" if inside else ""
    return f"{folder} holds no adapter: no {RECORD} (lorakit) and no {CONFIG} (PEFT){hint}"
